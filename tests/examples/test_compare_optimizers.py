"""examples/comparisons/compare_optimizers.py: what it computes from runs; it goes on where it was interrupted."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from compare_optimizers import METRIC, best_decays, finished, table
from tables import mean_and_error


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "comparisons" / "compare_optimizers.py"


def row(optimizer, decay, seed, accuracy):
    return {
        "optimizer": optimizer,
        "weight_decay": decay,
        "seed": seed,
        METRIC: accuracy,
        "eval_loss": 1 - accuracy,
        "final_grad_norm": 2.0,
        "final_weight_decay": decay,
        "mean_weight_decay": decay,
    }


ROWS = [
    row("adams", 0.1, 1, 0.75),  # seeds in any order
    row("adams", 0.1, 0, 0.7),
    row("adams", 0.2, 0, 0.6),
    row("adams", 0.2, 1, 0.6),
    row("adamw", 0.0, 0, 0.5),
    row("adamw", 0.0, 1, 0.5),
    row("adamw", 1.0, 0, 0.6),
    row("adamw", 1.0, 1, 0.7),
]


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    mean, error = mean_and_error([3.0])
    assert mean == 3.0 and math.isnan(error)


def test_best_decay_is_that_of_the_best_mean():
    assert best_decays(ROWS) == {"adams": 0.1, "adamw": 1.0}


def test_table_pairs_the_seeds_and_calls_adamw_without_decay_adam():
    text = table(ROWS)
    assert "| adams | 0.1 (best) | 2 | 0.725 ± 0.025 " in text
    assert "| adam | 0 | 2 |" in text
    # 0.70 - 0.60 and 0.75 - 0.70: seed by seed, although the rows are in another order
    assert "- accuracy: +0.075 ± 0.025" in text
    assert "- adams: 0.125 over 2 values" in text and "- adamw: 0 over 1 values" in text


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    command = ["run_glue.py", "--seed", "0"]
    assert not finished(tmp_path, command)
    (tmp_path / "command.json").write_text(json.dumps(command))
    assert not finished(tmp_path, command)  # interrupted
    (tmp_path / "all_results.json").write_text(json.dumps({"train_loss": 1.0}))
    assert not finished(tmp_path, command)  # interrupted before the evaluation
    (tmp_path / "all_results.json").write_text(json.dumps({METRIC: 1.0}))
    assert finished(tmp_path, command)
    with pytest.raises(ValueError, match="--output_dir"):
        finished(tmp_path, [*command, "--max_steps", "3"])


@pytest.mark.slow
def test_comparison_runs_and_goes_on(tmp_path):
    command = [sys.executable, str(SCRIPT), "--task", "digits", "--seeds", "0"]
    command += ["--adamw_weight_decay", "0.5", "--adams_weight_decay", "0.0005", "--output_dir", str(tmp_path), "--"]
    command += [
        "--max_steps",
        "4",
        "--max_train_samples",
        "64",
        "--max_eval_samples",
        "32",
        "--logging_steps",
        "1",
        "--use_cpu",
    ]

    subprocess.run(command, check=True, timeout=400)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["optimizer"], float(r["weight_decay"])) for r in rows] == [("adams", 0.0005), ("adamw", 0.5)]
    assert all(0 <= float(r[METRIC]) <= 1 and float(r["final_grad_norm"]) > 0 for r in rows)
    assert float(rows[1]["final_weight_decay"]) == 0.5 != float(rows[0]["final_weight_decay"])
    assert {"results.md", "robustness.png", "training.png"} <= {path.name for path in tmp_path.iterdir()}

    log = tmp_path / "adams-0.0005-seed0" / "log.txt"
    before = log.stat().st_mtime_ns
    (tmp_path / "adamw-0.5-seed0" / "all_results.json").unlink()  # as if interrupted
    subprocess.run(command, check=True, timeout=400)
    assert log.stat().st_mtime_ns == before
    assert (tmp_path / "adamw-0.5-seed0" / "all_results.json").exists()
