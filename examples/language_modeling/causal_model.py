"""The model of run_clm.py: a checkpoint, or a small model from random weights; perhaps with LoRA; its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from embedded_text import train_tokenizer, wrap_tokenizer
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


# 0.8 million parameters beside the embeddings: minutes on a CPU.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
DTYPES = ("auto", "bfloat16", "float16", "float32")
LONGEST_DEFAULT_BLOCK = 1024


@dataclass
class LoraArguments:
    """Adapters instead of all weights."""

    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters; without it, all weights are trained."}
    )
    lora_alpha: float = field(default=16, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get adapters, such as `q_proj v_proj` or `all-linear`; by default PEFT's choice for "
            "the model."
        },
    )


# --- tokenizer ---


def load_tokenizer(
    name: str | None, texts: Iterable[str], vocab_size: int, **hub: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of that name; without a name, one trained on the texts, the same in all processes."""
    if name is not None:
        return AutoTokenizer.from_pretrained(name, **hub)
    trained = [train_tokenizer(texts, vocab_size).to_str() if PartialState().is_main_process else None]
    (serialized,) = broadcast_object_list(trained)
    return wrap_tokenizer(Tokenizer.from_str(serialized))


# --- model ---


def small_config(model_type: str, overrides: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """A config of this type with the sizes of `SMALL`, as far as the type has them, and what `overrides` says."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type={model_type!r} is no causal language model of Transformers.")
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    settings = {key: value for key, value in SMALL.items() if hasattr(defaults, key)}
    if overrides is not None:
        try:
            defaults.update_from_string(overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config_overrides={overrides!r}: {error}; expected settings of {config_class.__name__} such as "
                "hidden_size=256,num_hidden_layers=6."
            ) from error
        settings |= {key: getattr(defaults, key) for key in (part.split("=")[0] for part in overrides.split(","))}
    heads = settings.get("num_attention_heads", 1)
    if settings.get("hidden_size", heads) % heads:
        raise ValueError(
            f"config_overrides={overrides!r}: hidden_size={settings['hidden_size']} must be a multiple of "
            f"num_attention_heads={heads}."
        )
    # The type's defaults are those of a large model.
    derived = {"num_key_value_heads": heads, "head_dim": settings.get("hidden_size", heads) // heads}
    settings = {**{key: value for key, value in derived.items() if hasattr(defaults, key)}, **settings}
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return config_class(vocab_size=len(tokenizer), **tokens, **settings)


def load_model(
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "float32",
    model_type: str = "llama",
    overrides: str | None = None,
    **hub: str | None,
) -> PreTrainedModel:
    """The checkpoint of that name; without a name, a model from random weights."""
    if name is None:
        config = small_config(model_type, overrides, tokenizer)
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        return AutoModelForCausalLM.from_config(config, **options)
    config = AutoConfig.from_pretrained(name, **hub)
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, and {name} knows {vocab_size}; leave out --tokenizer_name to "
            "use the checkpoint's own."
        )
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **hub)


def longest_block(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """In tokens."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def choose_block_size(asked: int | None, longest: int) -> int:
    if asked is None:
        return min(longest, LONGEST_DEFAULT_BLOCK)
    if not 2 <= asked <= longest:
        raise ValueError(f"block_size={asked}; expected 2 to {longest}, the longest input of the model.")
    return asked


# --- LoRA ---


def add_lora(model: PreTrainedModel, lora: LoraArguments) -> torch.nn.Module:
    """The model with adapters, which alone are trained and saved."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"lora_r={lora.lora_r} needs PEFT: pip install peft") from error
    targets = lora.lora_target_modules
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,  # in a list it would be a module
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
