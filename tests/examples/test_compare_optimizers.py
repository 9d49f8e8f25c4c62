"""examples/comparisons/compare_optimizers.py: what it computes from runs; it goes on where it was interrupted."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import compare_optimizers
import pandas as pd
import pytest
import torch
from compare_optimizers import TASKS, Progress, Run, command_of, finished, parse_arguments, result_of
from comparison_report import Measure, Results, plot_robustness, table, verdict
from safetensors.torch import save_file
from transformers import HfArgumentParser, TrainingArguments

import hf_swd  # noqa: F401 - optim="adams"
from hf_swd.trainer.optim_args import parse_optim_args


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "comparisons" / "compare_optimizers.py"
ACCURACY = Measure("eval_accuracy", "accuracy", larger_is_better=True)
LOSS = Measure("eval_loss", "validation loss")


def quickstart():
    """The comparisons of the quickstart, and the one that it proposes at its end."""
    text = (SCRIPT.parents[2] / "scripts" / "quickstart.sh").read_text()
    lines = re.sub(r"\\+\n", " ", text).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python examples/comparisons/compare_optim")]


def row(optimizer, decay, seed, accuracy, mean_decay=None, **others):
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
        **others,
    }


def results(rows, metric=ACCURACY):
    return Results(pd.DataFrame(rows), metric)


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


@pytest.mark.parametrize("measure", [ACCURACY, LOSS])
def test_best_decay_is_that_of_the_best_mean(measure):
    found = results(ROWS, measure)
    assert {optimizer: found.best(optimizer) for optimizer in found.grids} == {"adams": 0.1, "adamw": 1.0}


def test_a_run_that_went_nan_is_not_the_best():
    found = results([*ROWS, row("adams", 0.05, 0, math.nan), row("adams", 0.3, 0, math.nan)], LOSS)
    assert found.best("adams") == 0.1
    assert "| adams | 0.05 | 1 | nan |" in table(found)


def test_table_pairs_the_seeds_and_calls_adamw_without_decay_adam():
    text = table(results(ROWS))
    assert "| adams | 0.1 (best) | 2 | 0.725 ± 0.025 " in text
    assert "| adam | 0 | 2 |" in text
    # 0.70 - 0.60 and 0.75 - 0.70: seed by seed, although the rows are in another order
    assert "- each at its best (0.1, 1): accuracy +0.075 ± 0.025" in text
    assert "- at equal mean decay (0.1, 1): accuracy +0.075 ± 0.025" in text
    assert "Over the weight decays" not in text  # two each


def test_table_sums_up_a_grid():
    rows = [row("adamw", decay, 0, accuracy) for decay, accuracy in ((0.0, 0.1), (0.5, 0.6), (1.0, 0.7), (2.0, 0.6))]
    text = table(results([*rows, *(row("adams", decay, 0, decay / 10) for decay in (1.0, 2.0, 3.0))]))
    assert "- adamw: 0.7 at 1; 0.1 over 3 values" in text
    assert "- adams: the best is at an end; 0.2 over 3 values" in text
    assert "| adamw | 1 | 1 | 0.7 | 0.7 |" in text  # one seed has no error, and chooses no best


def test_one_seed_or_one_value_has_no_best():
    one_seed = table(results([row("adamw", 0.1, 0, 0.5), row("adamw", 2.0, 0, 0.6), row("adams", 2.0, 0, 0.7)]))
    one_value = table(results([row(name, 2.0, seed, 0.5) for name in ("adamw", "adams") for seed in (0, 1)]))
    for text in (one_seed, one_value):
        assert "best)" not in text and "at its best" not in text
        assert text.count("- at equal") == 1 and "- at equal weight_decay (2, 2): accuracy +" in text


def test_differences_are_over_the_seeds_that_both_have():
    text = table(results([*ROWS, row("adams", 0.1, 2, 0.99, mean_decay=1.0)]))
    assert "- each at its best (0.1, 1): accuracy +0.075 ± 0.025" in text


def test_settings_without_a_seed_in_common_have_no_difference():
    text = table(results([row("adamw", 1.0, 0, 0.5), row("adams", 0.1, 1, 0.6, mean_decay=1.0)]))
    assert "- at equal mean decay (0.1, 1): no seed in common" in text


def test_equal_decay_is_the_effective_one_of_the_run():
    assert results(ROWS).of_same_decay("adams", 0.1, "adamw") == 1.0
    assert results(ROWS).of_same_decay("adams", 0.2, "adamw") is None


@pytest.mark.parametrize(("measure", "sign"), [(ACCURACY, 1), (LOSS, -1)])
def test_best_between_the_decays_is_the_vertex_of_a_parabola(measure, sign):
    def loss(decay):
        return 0.2 + 0.03 * math.log(decay / 1.3) ** 2 if decay else 0.9

    rows = [row("adamw", decay, 0, 1 - loss(decay)) for decay in (0.0, 0.5, 1.0, 4.0)]
    decay, value = results(rows, measure).interpolated_best("adamw")
    assert decay == pytest.approx(1.3) and value == pytest.approx(0.8 if sign > 0 else 0.2)
    assert results(rows[:3], measure).interpolated_best("adamw") is None  # who knows what comes after the end


def loss_row(optimizer, decay, seed, loss, best=None, grad_norm=2.0):
    return row(optimizer, decay, seed, 0.5, eval_loss=loss, best_eval_loss=best or loss, final_grad_norm=grad_norm)


def test_verdict_says_in_three_sentences_what_decided():
    rows = [
        loss_row("adamw", 0.1, 42, 2.113, best=1.97),
        loss_row("adamw", 2.0, 42, 1.897, grad_norm=2.9),
        loss_row("adams:reference_steps=100", 2.0, 42, 1.928, grad_norm=2.523),
    ]
    assert verdict(results(rows, LOSS)) == [
        "Validation loss at the end (lower is better): AdamW 0.1: 2.11 (it overfits: 1.97 at its best), AdamW 2: "
        "1.90, AdamS 2: 1.93.",
        "AdamS 2 ended 0.031 worse than AdamW 2, with a gradient norm 13 % lower.",
        "The strength of the decay decides here (a difference of 0.22), not its schedule (0.031). One seed each: "
        "differences below 0.01 (0.5 %) may be chance.",
    ]


@pytest.mark.parametrize(
    ("weak", "strong", "adams", "said"),
    [
        (
            1.90,
            1.91,
            1.60,
            "Not the strength of the decay decides here (a difference of 0.01), but its schedule (0.3).",
        ),
        (1.90, 1.70, 1.60, "The strength of the decay (a difference of 0.2) and its schedule (0.1) weigh alike here."),
        (
            1.900,
            1.901,
            1.902,
            "Neither the strength of the decay (a difference of 0.001) nor its schedule (0.002) stands",
        ),
    ],
)
def test_verdict_weighs_strength_against_schedule(weak, strong, adams, said):
    rows = [
        loss_row(*setting, seed, loss + 0.01 * (1 - 2 * seed) * (1 if setting[0] == "adams" else -1))
        for seed in (0, 1)
        for setting, loss in ((("adamw", 0.1), weak), (("adamw", 2.0), strong), (("adams", 2.0), adams))
    ]
    *_, ended, last = verdict(results(rows, LOSS))
    assert last.startswith(said) and "standard errors over the seeds are 0.04." in last
    # At another weight decay, the gradient norm tells nothing of the optimizer.
    assert ("gradient norm" in ended) == ("AdamW 2" in ended)


def test_verdict_takes_noise_for_noise():
    """One seed each, on a text where nothing mattered; the gradient norms are of other weight decays."""
    rows = [
        loss_row("adamw", 0.1, 0, 1.294, grad_norm=1.4),
        loss_row("adamw", 1.0, 0, 1.299, grad_norm=2.2),
        loss_row("adams:reference_steps=100", 1.0, 0, 1.293, grad_norm=2.0),
    ]
    _, ended, last = verdict(results(rows, LOSS))
    assert ended == "AdamS 1 ended as well as AdamW 0.1."
    assert last == (
        "Neither the strength of the decay (a difference of 0.005) nor its schedule (0.001) stands out from chance "
        "here. One seed each: differences below 0.0065 (0.5 %) may be chance."
    )


def test_verdict_of_a_single_setting_or_optimizer_compares_nothing():
    assert verdict(results([row("adams", 1.0, 0, 0.5)])) == []
    (line,) = verdict(results([row("adams", 1.0, 0, 0.5), row("adams", 2.0, 0, 0.6)]))
    assert line == "Accuracy at the end (higher is better): AdamS 1: 0.500, AdamS 2: 0.600."
    (line,) = verdict(results([row("adamw", 1.0, 0, 0.5), row("adams", 1.0, 0, math.nan)]))
    assert line.endswith("AdamW 1: 0.500, AdamS 1: nan.")


def test_a_curve_needs_three_values(tmp_path):
    assert not plot_robustness(results(ROWS), tmp_path / "picture.png")
    rows = [row("adamw", decay, 0, 0.5) for decay in (0.0, 0.1, 1.0, 10.0)]
    assert plot_robustness(results(rows), tmp_path / "picture.png") and (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("options", [["--max_steps", "40", "--logging_steps", "10"], ["--num_train_epochs", "2"]])
def test_progress_of_a_run_is_that_of_its_logs(options, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("title", options) as progress:
        for number in range(1, 5):
            progress.read(f"{{'loss': '{5 - number}', 'epoch': '{0.5 * number}'}}\n")
            progress.read("a warning of something\n")
            assert progress._bar.n == pytest.approx(number / 4)
        assert progress._bar.postfix == "loss 1.00"


@pytest.mark.parametrize(("seconds", "lines"), [(0, ["title: 50 %, loss 2.00", "title: 100 %, loss 1.00"]), (30, [])])
def test_progress_of_a_run_in_a_file_is_lines(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(compare_optimizers, "SECONDS_BETWEEN_LINES", seconds)
    with Progress("title", ["--max_steps", "40", "--logging_steps", "20"]) as progress:
        for loss in (2, 1):
            progress.read(f"{{'loss': '{loss}', 'epoch': '1'}}\n")
    assert capsys.readouterr().err.splitlines() == lines


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
    expected |= {"weight_norm": 6.0, "mean_weight_decay": 1.9 / 0.5, "final_weight_decay": 2.0}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    constant = result_of(Run("adamw", 0.5, 0), tmp_path, LOSS)
    assert constant["mean_weight_decay"] == result["mean_weight_decay"]  # what the log says


def test_command_of_a_run():
    command = command_of(Run("adams:reference_steps=9,unclipped_norm=true", 0.1, 3), TASKS["lm"], ["--max_steps", "5"])
    line = " ".join(command)
    assert "--optim adams --optim_args reference_steps=9,unclipped_norm=true --weight_decay 0.1 --seed 3" in line
    assert line.startswith("language_modeling/run_clm.py ") and line.endswith(" --max_steps 5")
    assert " --embedded " in line
    assert "--optim adamw_torch_fused --weight_decay" in " ".join(command_of(Run("adamw", 0.1, 3), TASKS["lm"], []))


@pytest.mark.parametrize("source", [["--train_file", "text.txt"], ["--train_file=text.txt"], ["--dataset_name", "x"]])
def test_own_data_take_the_place_of_those_without_a_download(source):
    assert "--embedded" not in command_of(Run("adamw", 0.1, 3), TASKS["lm"], source)


@pytest.mark.parametrize(
    "given", [["--optimizer", "adamw"], ["--optimizer", "adamw", "0.1", "much"], ["--optimizer", "adamw", "-1"]]
)
def test_an_optimizer_without_good_decays_is_refused(given, tmp_path):
    command = [sys.executable, str(SCRIPT), "--task", "lm", "--output_dir", str(tmp_path), *given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "expected" in result.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", quickstart(), ids=["bert", "lm", "next"])
def test_commands_of_the_quickstart(command, monkeypatch, tmp_path):
    """They are valid, and the runs of all have what `hf-swd advise` needs: evaluations on the way and at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    asked = parse_arguments()
    task = TASKS[asked.task]
    parser = HfArgumentParser(TrainingArguments)
    for optimizer, decays in asked.optimizers.items():
        _, *options = line = command_of(Run(optimizer, decays[0], 0), task, asked.script_arguments)
        given = [*options, "--output_dir", "out", "--use_cpu", "True"]
        args, _ = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
        assert args.eval_strategy == "steps" and args.eval_steps < args.max_steps
        assert args.max_steps % args.eval_steps == 0
        assert ("--embedded" in line) != ("YOUR_TEXT.txt" in line)
        if args.optim == "adams":
            assert parse_optim_args(args.optim_args)["reference_steps"] <= args.max_steps / 3


def test_the_end_of_the_output_of_a_run_that_fails_is_shown(tmp_path):
    command = [sys.executable, str(SCRIPT), "--task", "lm", "--output_dir", str(tmp_path), "--optimizer", "adamw", "1"]
    result = subprocess.run(
        [*command, "--", "--train_file", "missing.txt"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1 and "train_file='missing.txt'; there is no such file" in result.stderr
    assert str(tmp_path / "adamw-1-seed0" / "log.txt") in result.stderr
    assert 'compare_optimizers.py", line' not in result.stderr  # no traceback of its own


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
    assert {"results.md", "training.png"} <= {path.name for path in tmp_path.iterdir()}

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
