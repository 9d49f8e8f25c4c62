"""Trains a causal language model with AdamS or any other optimizer of the Trainer: from random weights, or further.

Without a download (a small Llama from random weights, Python's standard library as the text; see embedded_text.py):

    pip install -e ".[examples]"
    python examples/language_modeling/run_clm.py --embedded --do_train --do_eval --output_dir outputs/clm \\
        --optim adams --weight_decay 5e-4 --learning_rate 2e-3 --adam_beta2 0.99 --max_grad_norm 0 \\
        --warmup_steps 100 --lr_scheduler_type cosine --block_size 128 --per_device_train_batch_size 16 \\
        --max_steps 600 --logging_steps 50 --report_to tensorboard

Files (.txt; or .csv, .json, .jsonl with a text per row), from random weights or from a checkpoint, with LoRA or not:

    python examples/language_modeling/run_clm.py --train_file train.txt --validation_file validation.txt \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M --lora_r 8 --do_train --do_eval --optim adams \\
        --optim_args reference_steps=100 --weight_decay 0.01 --learning_rate 1e-4 --output_dir outputs/lora

A data set from the Hub:

    python examples/language_modeling/run_clm.py --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --model_name_or_path openai-community/gpt2 --do_train --do_eval \\
        --optim adams --optim_args reference_steps=100 --weight_decay 0.01 --output_dir outputs/wikitext

All arguments from a file: `python examples/language_modeling/run_clm.py arguments.yaml` (or .json). Several processes:
`accelerate launch --config_file examples/configs/fsdp2.yaml examples/language_modeling/run_clm.py ...`. Training goes
on from the last complete checkpoint in --output_dir if there is one.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from causal_model import (
    DTYPES,
    SMALL,
    LoraArguments,
    add_lora,
    choose_block_size,
    load_model,
    load_tokenizer,
    longest_block,
)
from corpus import TextSource, TokenBlocks, load_text, tokenize
from embedded_text import MIN_VOCAB_SIZE, TEXTS
from transformers import EvalPrediction, TrainingArguments, default_data_collator

import hf_swd  # makes --optim adams known to TrainingArguments


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from engine_in_use import EngineCallback, wrap_own_layers
from trainer_setup import HubArguments, OutputArguments, finish, parse_arguments, save_training, start


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(LoraArguments, HubArguments):
    """Which model to train: a checkpoint, or a small one from random weights."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint: a folder or a name on the Hub. Without it, a model starts from random weights."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Architecture of the model from random weights: llama (default), qwen3, gpt2, ..."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Settings of the model from random weights, such as hidden_size=256,num_hidden_layers=6; others "
            "are " + ", ".join(f"{key}={value}" for key, value in SMALL.items()) + "."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, if it is not the checkpoint's own. Without both, one is trained on the training text."
        },
    )
    vocab_size: int = field(
        default=2048,
        metadata={"help": f"Tokens of the tokenizer that is trained; with {MIN_VOCAB_SIZE} every byte is a token."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights; for mixed precision see --bf16.", "choices": DTYPES},
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and (self.config_overrides or self.model_type):
            raise ValueError(
                f"model_type={self.model_type!r}, config_overrides={self.config_overrides!r} with "
                f"model_name_or_path={self.model_name_or_path!r}; a checkpoint has its own settings: leave them out."
            )
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r}; expected at least 1, or nothing to train all weights.")
        if self.lora_r is not None and self.model_name_or_path is None:
            raise ValueError(
                f"lora_r={self.lora_r} without model_name_or_path; adapters of random weights, which are not saved, "
                "are of no use: name a checkpoint."
            )


@dataclass
class DataTrainingArguments(TextSource, OutputArguments):
    """What to train and evaluate on, and how much of it."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Length of the inputs, in tokens; by default the longest of the model, 1024 at most."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many blocks."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of using the cache."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1, or nothing for all blocks.")


def likeliest_tokens(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Instead of the logits of a whole vocabulary, which would fill the memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the tokens that are the likeliest after those before them."""
    return {"accuracy": float(np.mean(prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]))}


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def main() -> None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataTrainingArguments, TrainingArguments))
    checkpoint = start(training_args, data_args.overwrite_output_dir, logger)

    with training_args.main_process_first(desc="loading the text"):
        data = load_text(data_args, model_args.cache_dir, model_args.token)
    tokenizer_name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = load_tokenizer(tokenizer_name, data["train"]["text"], model_args.vocab_size, **model_args.hub)
    model = load_model(
        model_args.model_name_or_path,
        tokenizer,
        model_args.dtype,
        model_args.model_type or "llama",
        model_args.config_overrides,
        **model_args.hub,
    )
    block_size = choose_block_size(data_args.block_size, longest_block(model.config, tokenizer))
    if model_args.lora_r is not None:
        model = add_lora(model, model_args)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{type(model).__name__}, {num_trained:,} trained parameters, blocks of {block_size} tokens")

    def make_blocks(split: str, limit: int | None) -> TokenBlocks:
        with training_args.main_process_first(desc=f"tokenizing {split}"):
            tokens = tokenize(
                data[split],
                tokenizer,
                data_args.rows_are_lines(split),
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
            )
        return TokenBlocks(tokens["input_ids"], block_size, limit, name=split)

    train_dataset = eval_dataset = None
    if training_args.do_train:
        train_dataset = make_blocks("train", data_args.max_train_samples)
    if training_args.do_eval:
        eval_dataset = make_blocks("validation", data_args.max_eval_samples)

    trainer = hf_swd.SWDTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=likeliest_tokens,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.add_callback(EngineCallback(trainer, logger))
    wrap_own_layers(trainer)

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        save_training(trainer, result, len(train_dataset))

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics |= {"eval_samples": len(eval_dataset), "eval_perplexity": perplexity(metrics["eval_loss"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"tasks": "text-generation", "tags": ["hf_swd"]}
    if model_args.model_name_or_path is not None:
        card["finetuned_from"] = model_args.model_name_or_path
    if data_args.embedded:
        card["dataset"] = TEXTS[data_args.embedded_text].description
    elif data_args.dataset_name is not None:
        card |= {"dataset": data_args.dataset_name, "dataset_tags": data_args.dataset_name}
    finish(trainer, card)


if __name__ == "__main__":
    main()
