"""The training run that every engine repeats: a small model, 12 steps, most of them clipped, 1 % of decay per step.

The model is a BERT that classifies; engines that need a plan of how to divide it train a causal Llama or Mixtral. The
reference trains in one process and in float64, with the two-pass AdamS of `tests/support/reference_adams.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


STEPS = 12
GLOBAL_BATCH = 8
LR = 2e-3
WEIGHT_DECAY = 0.015
ADAMW_DECAY = 5.0  # 1 % per step as well
MAX_NORM = 0.35  # of the BERT, as WEIGHT_DECAY is


class Run(NamedTuple):
    weights: dict[str, Tensor]
    decays: list[float]


def build_model(dtype: torch.dtype = torch.float32, unused: bool = False, kind: str = "bert") -> nn.Module:
    """The model, of a `kind` of `KINDS`; with `unused` it has parameters that no loss depends on."""
    torch.manual_seed(0)
    model = KINDS[kind].build()
    if unused:
        model.unused = nn.Linear(64, 64)
    return model.to(dtype)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


_CAUSAL = {
    "vocab_size": 64,  # transformers before 5.23 wants a multiple of the number of processes
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
    "initializer_range": 0.2,  # at 0.02 all parts but the embeddings have next to no gradient
}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=48, **_CAUSAL))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager", **_CAUSAL
    )
    return MixtralForCausalLM(config)


class Kind(NamedTuple):
    """A model, and what clips most of its steps and takes 1 % of its weights per step."""

    build: Callable[[], nn.Module]
    max_norm: float = MAX_NORM
    weight_decay: float = WEIGHT_DECAY


KINDS = {"bert": Kind(_bert), "llama": Kind(_llama, 3.0, 0.15), "mixtral": Kind(_mixtral, 2.1, 0.1)}


def batches(first: int = 0, last: int = STEPS, kind: str = "bert") -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (STEPS * GLOBAL_BATCH, 9), generator=generator)
    labels = tokens.sum(1) % 3 if kind == "bert" else tokens
    return [
        {"input_ids": tokens[i : i + GLOBAL_BATCH], "labels": labels[i : i + GLOBAL_BATCH]}
        for i in range(first * GLOBAL_BATCH, last * GLOBAL_BATCH, GLOBAL_BATCH)
    ]


def share(batch: dict[str, Tensor], rank: int, world: int, micro: int = 0, micros: int = 1) -> dict[str, Tensor]:
    """The part of a global batch that a rank takes in one of its accumulation steps."""
    size = GLOBAL_BATCH // (world * micros)
    start = (rank * micros + micro) * size
    return {key: value[start : start + size] for key, value in batch.items()}


def groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY, split: bool = False) -> list[dict]:
    """Decay and no decay, as the Trainer makes them; with `split` the matrices of the last layer are a third group."""
    from hf_swd.param_groups import decay_parameter_names

    names = set(decay_parameter_names(model))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    last = {n for n in names if "layer.1" in n} if split else set()
    decayed = [p for n, p in named if n in names - last]
    result = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for n, p in named if n not in names], "weight_decay": 0.0},
    ]
    if split:
        result.append({"params": [p for n, p in named if n in last], "weight_decay": weight_decay})
    return result


@functools.cache
def initial_weights(unused: bool = False, kind: str = "bert") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in build_model(unused=unused, kind=kind).named_parameters()}


@functools.cache
def reference(
    *,
    optim: str = "adams",
    clip: bool = True,
    one_group: bool = False,
    unused: bool = False,
    reference_steps: int = 0,
    unclipped_norm: bool = False,
    adamw_steps: int = 0,
    kind: str = "bert",
) -> Run:
    """
    Final weights and effective decays of the run in one process, float64.

    Args:
        optim (`str`): "adams", or "adamw" (torch's, with a decay of 1 % per step).
        clip (`bool`): to the largest norm of the kind.
        one_group (`bool`): decay every parameter, as flat parameters that mix biases and matrices must.
        unused (`bool`): the model has parameters without gradient.
        reference_steps (`int`), unclipped_norm (`bool`): as of AdamS.
        adamw_steps (`int`): so many steps are AdamW's; AdamS goes on from its moments.
        kind (`str`): of the model.
    """
    from reference_adams import ReferenceAdamS

    model = build_model(torch.float64, unused, kind)
    max_norm, weight_decay = KINDS[kind].max_norm, KINDS[kind].weight_decay
    param_groups = groups(model, weight_decay)
    if one_group:
        param_groups = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    adamw = torch.optim.AdamW(
        [{**g, "weight_decay": ADAMW_DECAY if g["weight_decay"] else 0.0} for g in param_groups], lr=LR
    )
    adams = None
    clipped, decays = 0, []
    for step, batch in enumerate(batches(kind=kind)):
        model.zero_grad()
        model(**batch).loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
        factor = min(1.0, max_norm / (norm.item() + 1e-6)) if clip else 1.0
        clipped += factor < 1
        unclipped = [[None if p.grad is None else p.grad.clone() for p in group["params"]] for group in param_groups]
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
        if optim == "adamw" or step < adamw_steps:
            adamw.step()
            continue
        if adams is None:
            adams = ReferenceAdamS(param_groups, lr=LR, reference_steps=reference_steps, unclipped_norm=unclipped_norm)
            _take_over(adams, param_groups, adamw)
        adams.step([[p.grad for p in group["params"]] for group in param_groups], unclipped)
        decays.append(adams.groups[0]["decay"])
        with torch.no_grad():
            for group, new in zip(param_groups, adams.groups, strict=True):
                for p, value in zip(group["params"], new["params"], strict=True):
                    p.copy_(value)
    assert not clip or clipped >= STEPS // 2, f"{clipped} of {STEPS} steps clipped: the run must really clip"
    assert (
        reference_steps or unclipped_norm or optim == "adamw" or 0.003 < LR * min(decays) < LR * max(decays) < 0.1
    ), decays
    return Run({name: p.detach().clone() for name, p in model.named_parameters()}, decays)


def _take_over(adams, param_groups: list[dict], adamw: torch.optim.Optimizer) -> None:
    for group, new in zip(param_groups, adams.groups, strict=True):
        for p, state in zip(group["params"], new["state"], strict=True):
            if p in adamw.state:
                old = adamw.state[p]
                state.update(t=int(old["step"]), m=old["exp_avg"].clone(), v=old["exp_avg_sq"].clone())
                adams.steps = state["t"]


def distance(weights: dict[str, Tensor], expected: dict[str, Tensor], kind: str = "bert") -> float:
    """||w - w_ref|| / ||w_ref - w_init||: the error in units of the distance travelled."""
    start = initial_weights(len(expected) > len(initial_weights(kind=kind)), kind)
    assert set(weights) == set(expected), set(weights) ^ set(expected)
    error = sum((weights[n].double() - w).square().sum() for n, w in expected.items())
    travelled = sum((w - start[n].double()).square().sum() for n, w in expected.items())
    return (error / travelled).sqrt().item()
