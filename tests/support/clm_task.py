"""A text, a Llama and its tokenizer, and a run of run_clm.py on them: what the tests of language modelling share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


OVERRIDES = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """900 lines, in thirds."""
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("".join(f"for number in range({n}):\n\tprint(number)\n\n" for n in range(300)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder with a Llama of random weights and a tokenizer of bytes."""
    import torch
    from causal_model import load_model
    from embedded_text import train_tokenizer, wrap_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = wrap_tokenizer(train_tokenizer(["text"], 257))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    load_model(None, tokenizer, overrides=OVERRIDES).save_pretrained(folder)
    return folder


def settings(model: Path, text: Path, output_dir: Path, **changes) -> dict:
    """Of run_clm.py: four steps of 16 blocks under AdamS; of all weights, the first two are clipped."""
    return {
        "model_name_or_path": str(model),
        "train_file": str(text),
        "validation_file": str(text),
        "output_dir": str(output_dir),
        "block_size": 32,
        "do_train": True,
        "do_eval": True,
        "max_eval_samples": 16,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "optim": "adams",
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.5,
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "info",
        "seed": 3,
        **changes,
    }


def run_here(arguments: dict, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The log of run_clm.main() in this process, with its arguments in a JSON file."""
    import run_clm

    output_dir = Path(arguments["output_dir"])
    file = output_dir.parent / f"{output_dir.name}.json"
    file.write_text(json.dumps({**arguments, "use_cpu": True}))
    monkeypatch.setattr(sys, "argv", ["run_clm.py", str(file)])
    run_clm.main()
    return history(output_dir)


def history(output_dir: Path) -> list[dict]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]
