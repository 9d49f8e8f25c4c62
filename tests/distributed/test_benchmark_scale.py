"""scripts/benchmark_scale.py: the models have their known sizes, and a small one is measured under every engine."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch


pytest.importorskip("torch.testing._internal.distributed.fake_pg")

import benchmark_scale  # noqa: E402
import sharded_llama  # noqa: E402
from transformers import LlamaConfig  # noqa: E402


RANKS = 16  # two of each group of eight that tensor parallelism takes
SMALL = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
COLLECTIVES = {  # of AdamS, of torch's clipping (None: it stops)
    "FSDP2": (1, 1),
    "HSDP, 2 replicas": (1, 1),
    "FSDP2 x TP 8": (2, None),
    "FSDP2 x TP 8, sequence parallel": (2, 2),
}


def measure(engine: str, max_local_elements: int = 10**6) -> list[dict]:
    return benchmark_scale.measure(engine, "small", SMALL, RANKS, max_local_elements=max_local_elements, repetitions=3)


@pytest.mark.parametrize(
    ("name", "billions", "tensors"),
    [("1B", 1.24, 146), ("7B", 6.74, 291), ("70B", 70.55, 723), ("405B", 405.85, 1137)],
)
def test_sizes_of_the_models(name: str, billions: float, tensors: int) -> None:
    params = list(sharded_llama.build(sharded_llama.MODELS[name]).parameters())
    assert sum(p.numel() for p in params) / 1e9 == pytest.approx(billions, abs=0.005)
    assert len(params) == tensors


@pytest.mark.parametrize("engine", sharded_llama.ENGINES)
def test_collectives_of_a_step(engine: str) -> None:
    rows = {(row["what"], row["contender"]): row for row in measure(engine)}
    assert len(rows) == 4
    count, torchs = COLLECTIVES[engine]
    for what in ("step", "clip"):
        sizes = rows[what, "AdamS"]["collectives"]
        assert len(sizes) == count
        # Two numbers in float64 of every tensor, on the mesh dimension that all of them are sharded on.
        assert max(sizes) <= 128
        assert rows[what, "AdamS"]["median_ms"] > 0
    assert rows["step", "AdamW"]["collectives"] == []
    clipping = rows["clip", "AdamW"]
    if torchs is None:
        assert "same mesh" in clipping["error"]
    else:
        assert len(clipping["collectives"]) == torchs


def test_shards_are_those_of_one_rank() -> None:
    shares = {engine: measure(engine)[0] for engine in ("FSDP2", "HSDP, 2 replicas")}
    assert shares["FSDP2"]["local_elements"] == shares["FSDP2"]["parameters"] / RANKS
    assert shares["HSDP, 2 replicas"]["local_elements"] == 2 * shares["FSDP2"]["local_elements"]


def test_collectives_of_fsdp2_itself() -> None:
    """The number that docs/benchmarks/collectives.md sets AdamS's one beside."""
    layers = 3
    config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": layers})
    with sharded_llama.rank_0_of(RANKS):
        model = sharded_llama.build(config)
        sharded_llama.ENGINES["FSDP2"](model, RANKS)
        model.to_empty(device="cpu")
        tokens = torch.zeros(1, 4, dtype=torch.long)
        with benchmark_scale.Collectives() as seen:
            model(input_ids=tokens, labels=tokens).loss.backward()
    assert len(seen.sizes) == 3 * layers + 2


def test_a_combination_that_is_too_large_is_left_out() -> None:
    (row,) = measure("FSDP2", max_local_elements=100)
    assert "left_out" in row and "median_ms" not in row


def test_what_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_scale, "MODELS", {"small": SMALL, "1B": sharded_llama.MODELS["1B"]})
    arguments = (
        f"--ranks {RANKS} --repetitions 3 --seconds 0 --max_local_elements 1e6 --output_dir {tmp_path} --name it"
    )
    monkeypatch.setattr(sys, "argv", ["benchmark_scale.py", *arguments.split()])
    benchmark_scale.main()
    rows = json.loads((tmp_path / "it.json").read_text())["rows"]
    assert {row["engine"] for row in rows} == set(COLLECTIVES)
    text = (tmp_path / "it.md").read_text()
    assert text.count("| small | 16 |") == text.count("per rank: 1B on 16 (") == len(COLLECTIVES)
    assert "`torch.nn.utils.clip_grad_norm_` raises `All operands" in text
    assert (tmp_path / "it.png").exists() == bool(importlib.util.find_spec("matplotlib"))
