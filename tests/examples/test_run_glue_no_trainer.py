"""examples/classification/run_glue_no_trainer.py run for real in one process, with a tiny BERT on files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import text_task
import torch
from safetensors.torch import load_file


for name in ("accelerate", "datasets", "evaluate", "sklearn"):
    pytest.importorskip(name, reason="needs the extra: examples")

import run_glue_no_trainer  # noqa: E402


tiny_bert, tables = text_task.tiny_bert, text_task.tables


@pytest.fixture
def train(tiny_bert, tables, tmp_path, monkeypatch):
    """Runs the example with the given changes of its arguments; returns its output folder and its results."""
    from accelerate.state import AcceleratorState, GradientState

    def run(name: str = "out", *flags: str, **changes) -> tuple[Path, dict]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        settings = {
            "model_name_or_path": tiny_bert,
            "train_file": tables["train"],
            "validation_file": tables["validation"],
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "weight_decay": 0.01,
            "max_train_steps": 6,
            "logging_steps": 1,
            "seed": 3,
            **changes,
        }
        arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["run_glue_no_trainer.py", *arguments, *flags])
        run_glue_no_trainer.main()
        return tmp_path / name, json.loads((tmp_path / name / "all_results.json").read_text())

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_it_trains_evaluates_and_saves(train, tables):
    from transformers import pipeline

    folder, results = train(max_train_steps=16)
    assert results["engine"].startswith("NO, 1 processes") and "AdamS" in results["engine"]
    assert results["swd/weight_decay"] == pytest.approx(0.01 / results["swd/grad_rms"])
    assert json.loads((folder / "config.json").read_text())["label2id"] == {"negative": 0, "positive": 1}

    rows = list(csv.DictReader(tables["validation"].open()))
    answers = pipeline("text-classification", str(folder), device="cpu")([row["sentence"] for row in rows])
    right = [answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert results["eval_accuracy"] == sum(right) / len(right)
    assert (
        0.5
        <= results["eval_majority_baseline"]
        == max(sum(r["label"] == x for r in rows) for x in ("positive", "negative")) / len(rows)
    )


def test_regression_and_reference_steps(train, tables):
    files = {f"{split}_file": tables[f"regression_{split}"] for split in ("train", "validation")}
    _, results = train(**files, reference_steps=100)
    assert {"eval_mse", "eval_pearson"} <= results.keys() and "eval_majority_baseline" not in results
    assert results["swd/weight_decay"] == 0.01  # step 100 is not reached: AdamW's meaning


def test_accumulation_of_small_batches_is_the_large_batch(train, tiny_bert, tables, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    # Dropout would draw other numbers for other batch sizes.
    model = AutoModel.from_pretrained(tiny_bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "bert")
    settings = {"model_name_or_path": tmp_path / "bert", "max_train_steps": 3, "max_grad_norm": 0.2}
    large, expected = train("large", per_device_train_batch_size=16, **settings)
    small, results = train("small", gradient_accumulation_steps=2, **settings)
    for key in ("swd/weight_decay", "swd/grad_rms", "learning_rate"):
        assert results[key] == pytest.approx(expected[key], rel=1e-4), key
    weights = load_file(large / "model.safetensors")
    for name, weight in load_file(small / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("every", "checkpoint", "steps"), [("3", "step_3", 6), ("epoch", "epoch_1", 12)])
def test_resumed_run_is_the_uninterrupted_run(train, every, checkpoint, steps):
    folder, results = train("whole", checkpointing_steps=every, max_train_steps=steps)
    again, resumed = train("resumed", resume_from_checkpoint=folder / checkpoint, max_train_steps=steps)
    for key in ("train_loss", "learning_rate", "swd/weight_decay", "swd/grad_rms", "eval_accuracy"):
        assert resumed[key] == pytest.approx(results[key], rel=1e-6), key
    expected = load_file(folder / "model.safetensors")
    for name, weight in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)


def test_tracking_writes_the_effective_decay(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, results = train("tracked", "--with_tracking", report_to="tensorboard")
    found = EventAccumulator(str(folder / "run_glue_no_trainer"))
    found.Reload()
    decays = found.Scalars("swd/weight_decay")
    assert [entry.step for entry in decays] == list(range(1, 7))
    assert decays[-1].value == pytest.approx(results["swd/weight_decay"], rel=1e-6)
    assert {"loss", "learning_rate", "swd/grad_rms", "eval_accuracy"} <= set(found.Tags()["scalars"])


def test_wrong_arguments_name_the_value(train, capsys):
    with pytest.raises(SystemExit):
        train(checkpointing_steps="often")
    assert "--checkpointing_steps often" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exactly one source"):
        train("none", "--embedded")
