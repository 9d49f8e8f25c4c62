"""One rank's part of a Llama: the configurations, how engines shard them, and the fake group of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM


REPLICAS = 2  # of HSDP
TP = 8

MODELS = {
    "1B": LlamaConfig(  # Llama 3.2
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "7B": LlamaConfig(  # Llama 2
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "70B": LlamaConfig(  # Llama 3
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "405B": LlamaConfig(  # Llama 3.1
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    ),
}


def build(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def fsdp2(model: LlamaForCausalLM, ranks: int) -> None:
    _fully_shard(model, dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",)))


def hsdp(model: LlamaForCausalLM, ranks: int) -> None:
    shape = (REPLICAS, ranks // REPLICAS)
    _fully_shard(model, dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def fsdp2_tp(model: LlamaForCausalLM, ranks: int) -> None:
    """The linear layers of the blocks by columns and rows, as in transformers' plan; the rest over dp only."""
    _tensor_parallel(model, ranks, {}, {})


def fsdp2_tp_sp(model: LlamaForCausalLM, ranks: int) -> None:
    """Every parameter on both mesh dimensions: embeddings and head sharded, norms replicated over tp."""
    outside = {"model.embed_tokens": RowwiseParallel(), "model.norm": SequenceParallel(), "lm_head": ColwiseParallel()}
    inside = {name: SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
    _tensor_parallel(model, ranks, outside, inside)


def _tensor_parallel(model: LlamaForCausalLM, ranks: int, outside: dict, inside: dict) -> None:
    mesh = dist.init_device_mesh("cpu", (ranks // TP, TP), mesh_dim_names=("dp", "tp"))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    parallelize_module(model, mesh["tp"], outside)
    for layer in model.model.layers:
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        parallelize_module(layer, mesh["tp"], plan | inside)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    _fully_shard(model, mesh["dp"])


def _fully_shard(model: LlamaForCausalLM, mesh: dist.DeviceMesh) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


ENGINES: dict[str, Callable[[LlamaForCausalLM, int], None]] = {
    "FSDP2": fsdp2,
    f"HSDP, {REPLICAS} replicas": hsdp,
    f"FSDP2 x TP {TP}": fsdp2_tp,
    f"FSDP2 x TP {TP}, sequence parallel": fsdp2_tp_sp,
}


@contextlib.contextmanager
def rank_0_of(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_elements(model: LlamaForCausalLM) -> int:
    return sum(p.to_local().numel() for p in model.parameters())


def allocated(model: LlamaForCausalLM) -> list[Parameter]:
    """Its parameters, with random weights and gradients (of norm 10 here) in the shards of this rank."""
    scale = 10 / local_elements(model) ** 0.5
    params = list(model.to_empty(device="cpu").parameters())
    torch.manual_seed(0)
    for p in params:
        p.grad = torch.empty_like(p)
        p.detach().to_local().normal_(std=0.02)
        p.grad.to_local().normal_(std=scale)
    return params
