"""examples/comparisons/compare_optimizers.py: what it computes from runs; it goes on where it was interrupted."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare_optimizers import TASKS, Run, command_of, finished, result_of
from comparison_report import Measure, best_settings, interpolated_best, of_same_decay, table
from safetensors.torch import save_file
from tables import mean_and_error


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "comparisons" / "compare_optimizers.py"
ACCURACY = Measure("eval_accuracy", "accuracy", larger_is_better=True)
LOSS = Measure("eval_loss", "validation loss")


def row(optimizer, decay, seed, accuracy, mean_decay=None):
    return {
        "optimizer": optimizer,
        "weight_decay": decay,
        "seed": seed,
        "eval_accuracy": accuracy,
        "best_eval_accuracy": accuracy,
        "eval_loss": 1 - accuracy,
        "best_eval_loss": 1 - accuracy,
        "final_train_loss": 0.5,
        "final_grad_norm": 2.0,
        "weight_norm": 3.0,
        "final_weight_decay": decay,
        "mean_weight_decay": decay if mean_decay is None else mean_decay,
    }


ROWS = [
    row("adamw", 0.0, 0, 0.5),
    row("adamw", 0.0, 1, 0.5),
    row("adamw", 1.0, 0, 0.6),
    row("adamw", 1.0, 1, 0.7),
    row("adams", 0.1, 1, 0.75, mean_decay=1.02),  # seeds in any order
    row("adams", 0.1, 0, 0.7, mean_decay=0.98),
    row("adams", 0.2, 0, 0.6, mean_decay=2.0),
    row("adams", 0.2, 1, 0.6, mean_decay=2.0),
]


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    mean, error = mean_and_error([3.0])
    assert mean == 3.0 and math.isnan(error)


@pytest.mark.parametrize("measure", [ACCURACY, LOSS])
def test_best_decay_is_that_of_the_best_mean(measure):
    assert best_settings(ROWS, measure) == {"adams": 0.1, "adamw": 1.0}


def test_a_run_that_went_nan_is_not_the_best():
    rows = [*ROWS, row("adams", 0.05, 0, math.nan), row("adams", 0.3, 0, math.nan)]
    assert best_settings(rows, LOSS)["adams"] == 0.1


def test_table_pairs_the_seeds_and_calls_adamw_without_decay_adam():
    text = table(ROWS, ACCURACY)
    assert "| adams | 0.1 (best) | 2 | 0.725 ± 0.025 " in text
    assert "| adam | 0 | 2 |" in text
    # 0.70 - 0.60 and 0.75 - 0.70: seed by seed, although the rows are in another order
    assert "- each at its best (0.1, 1): accuracy +0.075 ± 0.025" in text
    assert "- at equal mean decay (0.1, 1): accuracy +0.075 ± 0.025" in text
    assert "Over the weight decays" not in text  # two each


def test_table_sums_up_a_grid():
    rows = [row("adamw", decay, 0, accuracy) for decay, accuracy in ((0.0, 0.1), (0.5, 0.6), (1.0, 0.7), (2.0, 0.6))]
    text = table([*rows, *(row("adams", decay, 0, decay / 10) for decay in (1.0, 2.0, 3.0))], ACCURACY)
    assert "- adamw: 0.7 at 1; 0.1 over 3 values" in text
    assert "- adams: the best is at an end; 0.2 over 3 values" in text
    assert "| adamw | 1 (best) | 1 | 0.7 | 0.7 |" in text  # one seed has no error


def test_differences_are_over_the_seeds_that_both_have():
    text = table([*ROWS, row("adams", 0.1, 2, 0.99, mean_decay=1.0)], ACCURACY)
    assert "- each at its best (0.1, 1): accuracy +0.075 ± 0.025" in text


def test_settings_without_a_seed_in_common_have_no_difference():
    text = table([row("adamw", 1.0, 0, 0.5), row("adams", 0.1, 1, 0.6, mean_decay=1.0)], ACCURACY)
    assert "- each at its best (0.1, 1): accuracy no seed in common" in text
    assert "- at equal mean decay (0.1, 1): accuracy no seed in common" in text


def test_equal_decay_is_the_effective_one_of_the_run():
    assert of_same_decay(ROWS, "adams", 0.1, "adamw") == 1.0
    assert of_same_decay(ROWS, "adams", 0.2, "adamw") is None


@pytest.mark.parametrize(("measure", "sign"), [(ACCURACY, 1), (LOSS, -1)])
def test_best_between_the_decays_is_the_vertex_of_a_parabola(measure, sign):
    def loss(decay):
        return 0.2 + 0.03 * math.log(decay / 1.3) ** 2 if decay else 0.9

    rows = [row("adamw", decay, 0, 1 - loss(decay)) for decay in (0.0, 0.5, 1.0, 4.0)]
    decay, value = interpolated_best(rows, "adamw", measure)
    assert decay == pytest.approx(1.3) and value == pytest.approx(0.8 if sign > 0 else 0.2)
    assert interpolated_best(rows[:3], "adamw", measure) is None  # who knows what comes after the end


def test_result_of_a_run(tmp_path):
    history = [
        {"step": 1, "loss": 3.0, "grad_norm": 2.0, "learning_rate": 0.3, "swd/weight_decay": 4.0},
        {"step": 1, "eval_loss": 1.5},
        {"step": 2, "loss": 1.0, "grad_norm": 4.0, "learning_rate": 0.1, "swd/weight_decay": 2.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    results = {"eval_loss": 2.5, "train_loss": 2.0, "train_runtime": 1.0}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    weights = {"w": torch.full((1, 2), 3.0, dtype=torch.bfloat16), "norm": torch.full((5,), 7.0)}
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"v": torch.full((2, 1), 3.0)}, tmp_path / "model-00002-of-00002.safetensors")
    result = result_of(Run("adams:reference_steps=1", 4.0, 0), tmp_path, LOSS)
    expected = {"eval_loss": 2.5, "best_eval_loss": 1.5, "final_grad_norm": 3.0, "final_train_loss": 2.0}
    expected |= {"weight_norm": 6.0, "mean_weight_decay": (0.3 * 4 + 0.1 * 2) / 0.4, "final_weight_decay": 2.0}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    constant = result_of(Run("adamw", 0.5, 0), tmp_path, LOSS)
    assert constant["mean_weight_decay"] == result["mean_weight_decay"]  # what the log says


def test_command_of_a_run():
    command = command_of(Run("adams:reference_steps=9,unclipped_norm=true", 0.1, 3), TASKS["lm"], ["--max_steps", "5"])
    line = " ".join(command)
    assert "--optim adams --optim_args reference_steps=9,unclipped_norm=true --weight_decay 0.1 --seed 3" in line
    assert line.startswith("language_modeling/run_clm.py ") and line.endswith(" --max_steps 5")
    assert "--optim adamw_torch_fused --weight_decay" in " ".join(command_of(Run("adamw", 0.1, 3), TASKS["lm"], []))


@pytest.mark.parametrize(
    "given", [["--optimizer", "adamw"], ["--optimizer", "adamw", "0.1", "much"], ["--optimizer", "adamw", "-1"]]
)
def test_an_optimizer_without_good_decays_is_refused(given, tmp_path):
    command = [sys.executable, str(SCRIPT), "--task", "lm", "--output_dir", str(tmp_path), *given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "expected" in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    command = ["run_glue.py", "--seed", "0"]
    assert not finished(tmp_path, command)
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    assert not finished(tmp_path, command)  # interrupted
    (tmp_path / "all_results.json").write_text(json.dumps({"train_loss": 1.0}))
    assert not finished(tmp_path, command)  # interrupted before the evaluation
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_loss": 1.0}))
    assert finished(tmp_path, command)
    with pytest.raises(ValueError, match="--output_dir"):
        finished(tmp_path, [*command, "--max_steps", "3"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "lm"])
def test_comparison_runs_and_goes_on(task, tmp_path):
    command = [sys.executable, str(SCRIPT), "--task", task, "--seeds", "0", "--jobs", "2"]
    command += ["--optimizer", "adamw", "0.5", "--optimizer", "adams", "0.0005", "--output_dir", str(tmp_path), "--"]
    command += "--max_steps 4 --max_train_samples 64 --max_eval_samples 32 --logging_steps 1 --use_cpu".split()
    metric = TASKS[task].metric.key

    subprocess.run(command, check=True, timeout=400)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["optimizer"], float(r["weight_decay"])) for r in rows] == [("adamw", 0.5), ("adams", 0.0005)]
    assert all(0 <= float(r[metric]) <= 10 and float(r["final_grad_norm"]) > 0 for r in rows)
    assert float(rows[0]["final_weight_decay"]) == 0.5 != float(rows[1]["final_weight_decay"])
    assert {"results.md", "robustness.png", "training.png"} <= {path.name for path in tmp_path.iterdir()}

    log = tmp_path / "adams-0.0005-seed0" / "log.txt"
    before = log.stat().st_mtime_ns
    (tmp_path / "adamw-0.5-seed0" / "all_results.json").unlink()  # as if interrupted
    subprocess.run(command, check=True, timeout=400)
    assert log.stat().st_mtime_ns == before
    assert (tmp_path / "adamw-0.5-seed0" / "all_results.json").exists()

    # A second call for more of them: the table holds all.
    command[command.index("0.0005")] = "0.001"
    subprocess.run(command, check=True, timeout=400)
    with (tmp_path / "results.csv").open() as file:
        assert [float(r["weight_decay"]) for r in csv.DictReader(file)] == [0.5, 0.0005, 0.001]
    assert log.stat().st_mtime_ns == before
