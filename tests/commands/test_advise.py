"""hf-swd advise: from what runs did it tells the weight decay to try next, and of a log that cannot tell, why not."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hf_utils import arguments, sentences, tiny_bert
from safetensors.torch import save_file
from transformers import Trainer

import hf_swd  # noqa: F401 - registers optim="adams"
from hf_swd.commands.advise import advise
from hf_swd.commands.forecast import Parabola, Tried, propose
from hf_swd.commands.launch import main
from hf_swd.commands.run_log import read_run


STEPS = 24
ADAMW = {"optim": "adamw_torch_fused", "max_grad_norm": 0.0, "seed": 0}


def train(folder, **changes):
    """A run that logs every step and evaluates every eighth; its folder."""
    settings = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "weight_decay": 0.2,
        **changes,
    }
    data = sentences()
    Trainer(tiny_bert(), arguments(folder, **settings), train_dataset=data, eval_dataset=data[:8]).train()
    return folder


def write(folder, evaluations, losses=None, *, rate=1e-2, epochs=20.0, norm=0.5, extra=None, **arguments_):
    """A made-up run of 200 steps with ten logs of training. `evaluations`: eval_loss or more, evenly spaced."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = losses or [1.0] * 10
    log = [
        {
            "step": 20 * i,
            "epoch": epochs * i / 10,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            **(extra or {}),
        }
        for i, loss in enumerate(losses, start=1)
    ]
    for i, found in enumerate(evaluations, start=1):
        found = found if isinstance(found, dict) else {"eval_loss": found}
        log.append({"step": 200 * i // len(evaluations), **found})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if arguments_:
        (folder / "training_args.json").write_text(json.dumps(arguments_))
    return folder


def said(*folders, metric=None) -> str:
    return "\n".join(advise(folders, metric).lines)


def proposed(text: str) -> float:
    return float(re.search(r"--weight_decay (\S+)", text.splitlines()[-1])[1])


# --- real runs ---


def test_decay_and_evaluations_of_a_real_run_are_what_it_did(tmp_path):
    folder = train(tmp_path, optim="adamw_torch", optim_args=None, learning_rate=0.01)
    log = read_run(folder)
    # Linear to zero. Versions of transformers differ by one step in the rate that they log.
    expected = sum(0.01 * (1 - t / STEPS) * 0.2 for t in range(STEPS))
    assert log.total_decay == pytest.approx(expected, rel=0.05)
    (took,) = re.findall(r"Decay took ([\d.]+) % of the weights", said(folder))
    assert float(took) == pytest.approx(100 * (1 - math.exp(-expected)), rel=0.05)
    assert [entry["step"] for entry in log.evaluations] == [8, 16, 24]
    assert log.epochs == log.entries[-1]["epoch"] > 1
    text = said(train(tmp_path / "rarely", max_steps=12, logging_steps=5))
    assert text.startswith(f"{tmp_path / 'rarely'}: 12 steps, {log.epochs / 2:.3g} passes over")
    assert log.dtypes == {"F32": sum(p.numel() for p in tiny_bert().parameters())}
    assert said(folder).splitlines()[-1].startswith("Arguments: --optim adamw_torch --weight_decay ")


def test_decay_of_adams_is_the_logged_one_and_its_options_are_kept(tmp_path):
    options = "base=adamw_torch,reference_steps=5"
    text = said(train(tmp_path, optim_args=options, learning_rate=1e-3))
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    decays = [entry["swd/weight_decay"] for entry in state["log_history"] if "swd/weight_decay" in entry]
    assert f"It was scheduled, from {decays[0]:.3g} to {decays[-1]:.3g}; its mean is " in text
    assert re.fullmatch(rf"Arguments: --optim adams --weight_decay \S+ --optim_args {options}", text.splitlines()[-1])


def test_runs_that_differ_in_more_than_weight_decay_and_seed_are_named(tmp_path):
    same = [train(tmp_path / f"{decay}", weight_decay=decay, seed=decay) for decay in (1, 2, 3)]
    other = train(tmp_path / "other", learning_rate=1e-4)
    advice = advise([*same, other])
    assert [setting.weight_decay for setting in advice.settings] == [1, 2, 3]
    (left_out,) = [line for line in advice.lines if line.startswith("Left out")]
    assert advice.left_out == [left_out]
    assert left_out == f"Left out: {other} (learning_rate=0.0001, not {arguments(tmp_path).learning_rate})."


# --- one run ---


def test_model_that_overfits_gets_a_decay_that_acts(tmp_path):
    run = write(tmp_path, [2.0, 1.9, 2.0, 2.2], [2.0 - 0.15 * i for i in range(10)], weight_decay=0.1, **ADAMW)
    text = said(run)
    assert "It overfits: the evaluation loss was lowest at step 100 (1.9), and has risen to 2.2 since" in text
    assert "while the training loss went from 1.4 to 0.65" in text
    assert "Decay took 18.1 % of the weights" in text  # 200 steps x 1e-2 x 0.1
    assert proposed(text) * 1e-2 * 200 >= 1.5 and text.splitlines()[-1].startswith(
        "Arguments: --optim adamw_torch_fused "
    )
    assert text.startswith(f"{tmp_path}: 200 steps, 20 passes over the training data")


def test_nothing_speaks_for_another_decay(tmp_path):
    fitted = write(tmp_path / "fitted", [2.0, 1.9], [1.6] * 10, weight_decay=0.1, **ADAMW)
    one_pass = write(tmp_path / "one", [2.0, 1.9], [0.5] * 10, epochs=1.0, weight_decay=0.1, **ADAMW)
    for run in (fitted, one_pass):
        assert "Keep 0.1: nothing speaks for another weight decay" in said(run)
        assert proposed(said(run)) == 0.1
        assert "It does not overfit: the evaluation loss ends at its lowest (1.9)." in said(run)
    assert "No sample was seen twice" in said(one_pass)
    nearly = write(tmp_path / "nearly", [2.0, 1.9, 1.905], [1.6] * 10, weight_decay=0.1, **ADAMW)
    assert "It does not overfit: the evaluation loss ends 0.26 % above its lowest (1.905)." in said(nearly)


def test_too_weak_and_too_strong_decays_are_told(tmp_path):
    weak = write(tmp_path / "weak", [2.0, 1.9], [1.8] * 10, weight_decay=0.01, **ADAMW)
    assert "Decay took 1.98 % of the weights in all: too little to matter" in said(weak)
    strong = write(tmp_path / "strong", [2.0, 1.9], [1.88] * 10, weight_decay=5.0, **ADAMW)
    assert proposed(said(strong)) <= 2.5


def test_without_decay_one_is_proposed_if_the_model_overfits(tmp_path):
    over = write(tmp_path / "over", [1.9, 2.2], [0.6] * 10, weight_decay=0.0, **ADAMW)
    assert "There was no weight decay" in said(over)
    assert 1 < proposed(said(over)) * 1e-2 * 200 < 3
    fits = write(tmp_path / "fits", [2.0, 1.9], [1.6] * 10, weight_decay=0.0, **ADAMW)
    assert proposed(said(fits)) == 0


def test_unclipped_norm_is_told_in_words_only(tmp_path):
    run = write(tmp_path, [1.9, 2.2], norm=3.0, weight_decay=0.1, **{**ADAMW, "max_grad_norm": 1.0})
    text = said(run)
    assert "10 of 10 logged steps were clipped to 1, so a schedule by the clipped gradient is constant" in text
    assert "unclipped_norm" in text and "unclipped_norm" not in text.splitlines()[-1]
    assert "were clipped" not in said(write(tmp_path, [1.9, 2.2], weight_decay=0.1, **{**ADAMW, "max_grad_norm": 1.0}))
    settings = {"optim": "adams", "max_grad_norm": 1.0, "optim_args": "reference_steps=20, unclipped_norm=True"}
    has_it = write(tmp_path, [1.9, 2.2], norm=3.0, extra={"swd/weight_decay": 0.1}, weight_decay=0.1, **settings)
    assert "were clipped" not in said(has_it) and "Decay took 18.1 %" in said(has_it)


@pytest.mark.parametrize("evaluations", [[2.0, 1.9], []])
def test_adams_at_the_weight_decay_of_adamw_is_led_to_reference_steps(tmp_path, evaluations):
    """As the warning of the training does; another weight decay would be in units of the gradient rms."""
    settings = {"optim": "adams", "max_grad_norm": 0.0, "weight_decay": 0.01, "optim_args": "amsgrad=true"}
    run = write(tmp_path / "run", evaluations, extra={"swd/weight_decay": 5.0}, **settings)
    *_, after, last = said(run).splitlines()
    assert after.startswith("Next: 0.01 with reference_steps=66. Without it") and "acted was 5." in after
    assert last == "Arguments: --optim adams --weight_decay 0.01 --optim_args amsgrad=true,reference_steps=66"
    assert "It was 5 in every logged step: nothing was scheduled." in said(run)
    for changes in ({"optim_args": "reference_steps=66"}, {"weight_decay": 5e-4}):
        run = write(tmp_path / "run", evaluations, extra={"swd/weight_decay": 5.0}, **{**settings, **changes})
        assert "with reference_steps=66." not in said(run)


def test_training_loss_above_the_evaluations(tmp_path):
    """With dropout it is."""
    run = write(tmp_path, [2.0, 1.0], [1.2] * 10, weight_decay=0.1, **ADAMW)
    assert "The training loss ends 20 % above it" in said(run)


def test_run_that_cannot_tell_says_what_is_missing(tmp_path):
    unknown = said(write(tmp_path / "unknown", [2.0, 1.9]))
    assert "unknown optimizer" in unknown and "weight_decay=unknown" in unknown
    sgd = said(write(tmp_path / "sgd", [2.0, 1.9], **{**ADAMW, "optim": "sgd", "weight_decay": 0.1}))
    assert "sgd is not known to have decoupled and constant decay" in sgd
    blind = said(write(tmp_path / "blind", [], weight_decay=0.1, **ADAMW))
    assert blind.splitlines()[-1] == (
        "No weight decay can be judged: the model was not evaluated during the training; give the Trainer an "
        "eval_dataset and add --eval_strategy steps --eval_steps 20."
    )
    assert unknown.splitlines()[-1] == (
        "No weight decay can be judged: training_args.bin, which has it, is missing or damaged."
    )
    none = {"optim": "adams", "weight_decay": 0.0, "extra": {"swd/weight_decay": 0.0}}
    assert "scheduled" not in said(write(tmp_path / "none", [], **none))
    once = said(write(tmp_path / "once", [1.9], weight_decay=0.1, **ADAMW))
    assert "Whether it overfits is not known" in once


def test_log_that_becomes_nan_says_from_where(tmp_path):
    losses = [1.0] * 5 + [math.nan] * 5
    text = said(write(tmp_path, [2.0, 1.9], losses, weight_decay=0.1, **ADAMW))
    assert "NaN or infinite from step 120 on." in text


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
@pytest.mark.parametrize("lr", [2e-5, 1e-4])
def test_weights_that_are_said_not_to_move_do_not(tmp_path, dtype, name, lr):
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.1 * torch.randn(4000)).to(dtype))
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.1, fused=True)
    for _ in range(100):
        weight.grad = torch.randn(4000).to(dtype)
        optimizer.step()
    run = write(tmp_path, [2.0, 1.9], rate=lr, weight_decay=0.1, **ADAMW)
    save_file({"weight": weight.detach()}, tmp_path / "model.safetensors")
    (still,) = re.findall(rf"saved in {name}\. If trained in it, those above (\S+) did not move", said(run))
    large = start.abs() > 1.02 * float(still)  # two digits
    assert torch.equal(weight[large], start[large])
    assert (weight != start)[start.abs() < float(still) / 4].any()
    save_file({"weight": weight.detach().float()}, tmp_path / "model.safetensors")
    assert "saved in" not in said(run)


# --- several runs ---


def grid(tmp_path, losses, **changes):
    """Runs by weight decay; several losses are those of several seeds."""
    folders = []
    for decay, values in losses.items():
        for seed, value in enumerate(values if isinstance(values, tuple) else (values,)):
            settings = {**ADAMW, **changes, "weight_decay": decay, "seed": seed}
            folders.append(write(tmp_path / f"{decay}-{seed}", [value + 0.5, value], [0.65 * value] * 10, **settings))
    return folders


def test_parabola_finds_the_optimum_of_a_parabola():
    def at(decay):
        return Tried(decay, 2 + 0.1 * math.log(decay / 1.7) ** 2)

    parabola = Parabola.through(at(0.5), at(1), at(8))
    assert parabola.optimum == pytest.approx(1.7) and parabola.gain == pytest.approx(at(1).loss - 2)
    assert parabola.above_best(8) == pytest.approx(at(8).loss - at(1).loss)
    assert propose([at(8), at(0.5), at(1)]).weight_decay == 1.7


def test_decays_too_weak_to_matter_do_not_widen_the_parabola():
    """A hundredth of the least that matters is as good as none, and as that least."""
    weak, least = (Tried(decay, 2.2, total=decay) for decay in (0.001, 0.1))
    strong = [Tried(2.0, 1.6, total=2.0), Tried(4.0, 1.8, total=4.0)]
    assert propose([weak, *strong]) == propose([least, *strong])
    # One that just matters is not taken for nearly the same as the least, which would make a steep parabola.
    assert propose([weak, Tried(0.101, 2.1, total=0.101), Tried(10.0, 2.3)]).parabola.gain < 0.2
    assert propose([weak, *strong]).parabola.optimum > 0.5 > Parabola.through(weak, *strong).optimum


def test_a_stronger_decay_that_made_no_difference_ends_the_search():
    weak, strong = Tried(0.1, 2.0, total=0.01, rise=0.0), Tried(1.0, 2.001, total=0.1, rise=0.0)
    assert propose([weak, strong], noise=0.04).weight_decay is None
    assert propose([weak, strong], noise=0.0001).weight_decay == 0.32
    # Unless the weak one overfits, and the other is strong: they may be alike as too weak and too strong.
    overfits = replace(weak, rise=0.1)
    assert propose([overfits, strong], noise=0.04).weight_decay is None
    assert propose([overfits, replace(strong, total=4.0)], noise=0.04).weight_decay == 0.32


def test_best_of_a_grid_is_refined_and_the_table_shows_it(tmp_path):
    text = said(*grid(tmp_path, {0.5: 2.0, 8.0: 2.2, 2.0: 1.9}))
    assert "| 0.5 | 0.5 | 1 | 2 | 2 | 1.3 |\n| 2 | 2 | 1 | 1.9 | 1.9 | 1.235 |\n| 8 | 8 | 1 | 2.2 |" in text
    assert re.search(r"A parabola .* has its optimum at 1.4\d, better by 0.01\d; the noise is 0.01\.", text)
    assert proposed(text) == pytest.approx(1.45, abs=0.06)


def test_run_whose_evaluation_is_nan_is_named(tmp_path):
    folders = grid(tmp_path, {0.5: 2.0, 2.0: 1.9})
    diverged = write(tmp_path / "diverged", [2.0, math.nan], [1.3] * 10, weight_decay=8.0, **ADAMW)
    advice = advise([*folders, diverged])
    assert f"Left out: {diverged} (no finite eval_loss, or no known weight_decay)." in advice.lines
    assert [setting.weight_decay for setting in advice.settings] == [0.5, 2.0]
    assert advice.lines[0].startswith("2 runs that differ")
    lone = said(folders[1], diverged)  # as if it had been alone, but for what is left out
    assert lone.startswith(f"{folders[1]}: 200 steps") and "weight_decay=2." in lone and "|" not in lone


def test_seeds_are_averaged_and_what_they_differ_by_ends_the_search(tmp_path):
    quiet = advise(grid(tmp_path / "quiet", {0.5: (2.0, 2.001), 2.0: (1.9, 1.901), 8.0: (2.2, 2.201)}))
    noisy = advise(grid(tmp_path / "noisy", {0.5: (1.9, 2.1), 2.0: (1.8, 2.0), 8.0: (2.1, 2.3)}))
    assert [len(setting.values) for setting in noisy.settings] == [2, 2, 2]
    assert quiet.proposal.weight_decay is not None and noisy.proposal.weight_decay is None
    assert "Seeds differ by 0.14 (standard deviation)." in "\n".join(noisy.lines)
    assert noisy.lines[-2].startswith("Keep 2:") and proposed("\n".join(noisy.lines)) == 2


def test_two_runs_alike_in_decay_and_seed_are_not_taken_for_two_seeds(tmp_path):
    one, other = (write(tmp_path / name, [2.0, 1.9], weight_decay=0.1, **ADAMW) for name in "ab")
    assert f"Left out: {other} (weight decay and seed are those of {one}" in said(one, other)


@pytest.mark.parametrize("optimum", [0.4, 2.0, 12.0])
@pytest.mark.parametrize("metric", ["eval_loss", "eval_accuracy"])
def test_five_runs_lead_to_the_optimum_of_a_task(tmp_path, optimum, metric):
    """A task whose gap closes as decay grows, whose evaluation loss rises again where decay is too weak."""
    folders, decay = [], 0.1
    for _ in range(5):
        distance = math.log(decay / optimum)
        loss = 1.9 + 0.04 * distance**2
        gap = min(0.95, max(0.0, 0.36 - 0.18 * distance))
        evaluations = [
            {"eval_loss": loss - min(0.0, 0.03 * (distance + 0.5)), "eval_accuracy": 0.1},
            {"eval_loss": loss - max(0.0, -0.1 * (distance + 0.5)), "eval_accuracy": 0.4},
            {"eval_loss": loss, "eval_accuracy": 0.9 - 0.03 * distance**2},
        ]
        folder = tmp_path / f"{decay}"
        folders.append(write(folder, evaluations, [loss * (1 - gap)] * 10, weight_decay=decay, **ADAMW))
        advice = advise(folders, metric)
        if advice.proposal.weight_decay is None:
            break
        decay = advice.proposal.weight_decay
    best = proposed(said(*folders, metric=metric)) if advice.proposal.weight_decay is None else decay
    assert 1.9 + 0.04 * math.log(best / optimum) ** 2 < 1.92


def test_load_best_model_at_end_judges_by_the_best_of_its_metric(tmp_path):
    kept = {"load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True}
    folders = [
        write(
            tmp_path / f"{decay}",
            [{"eval_loss": 1.0, "eval_f1": best}, {"eval_loss": 1.0, "eval_f1": last}],
            weight_decay=decay,
            **ADAMW,
            **kept,
        )
        for decay, best, last in ((0.5, 0.7, 0.69), (2.0, 0.8, 0.1), (8.0, 0.6, 0.6))
    ]
    advice = advise(folders)
    assert advice.metric.key == "eval_f1" and [s.mean for s in advice.settings] == [0.7, 0.8, 0.6]
    assert "Compared by eval_f1 at its best, as load_best_model_at_end takes it; more is better." in advice.lines
    assert 0.5 < advice.proposal.parabola.optimum < 2.0
    assert [s.mean for s in advise(folders, "loss").settings] == [1.0, 1.0, 1.0]


def test_metric_that_speaks_for_another_decay_is_named(tmp_path):
    """A decay that makes a classifier less sure of itself lowers its loss, and may cost accuracy."""
    folders = [
        write(tmp_path / f"{decay}", [{"eval_loss": loss, "eval_accuracy": accuracy}], weight_decay=decay, **ADAMW)
        for decay, loss, accuracy in ((0.1, 2.2, 0.485), (79.0, 1.6, 0.41))
    ]
    assert "By eval_accuracy, 0.1 is the best (0.485), not 79 (0.41): --metric accuracy decides by it." in said(
        *folders
    )
    assert "By eval_loss, 79 is the best (1.6), not 0.1 (2.2)" in said(*folders, metric="accuracy")


def test_metric_that_no_run_has_is_named(tmp_path):
    run = write(tmp_path, [2.0], weight_decay=0.1, **ADAMW)
    with pytest.raises(ValueError, match="metric='bleu': no run has it; they have eval_loss"):
        advise([run], "bleu")


# --- files and command line ---


def test_dtypes_are_those_of_all_parts_of_the_saved_weights(tmp_path):
    run = write(tmp_path, [2.0, 1.9])
    assert read_run(run).dtypes == {}
    half, whole, count = torch.zeros(2, 3).half(), torch.zeros(()), torch.zeros(9, dtype=torch.int64)
    save_file({"half": half}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"whole": whole, "count": count}, tmp_path / "model-00002-of-00002.safetensors")
    assert read_run(run).dtypes == {"F16": 6, "F32": 1}
    save_file({"adapter": whole}, tmp_path / "adapter_model.safetensors")
    assert read_run(run).dtypes == {"F32": 1}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    assert read_run(run).dtypes == {"F16": 6, "F32": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"log_history": 3}', "not a trainer state"),  # others: test_plot.py
        ('{"log_history": []}', "0 of its logs are finite and have a learning_rate"),
        (json.dumps({"log_history": [{"step": 1, "learning_rate": 0.1}]}), "1 of its logs are"),
        (json.dumps({"log_history": [{"step": s, "loss": 1.0} for s in (1, 2)]}), "0 of its logs are"),
    ],
)
def test_foreign_and_short_logs_get_one_sentence(tmp_path, capsys, content, message):
    (tmp_path / "trainer_state.json").write_text(content)
    assert main(["advise", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-swd advise: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_command_line(tmp_path, capsys, monkeypatch):
    folders = [str(folder) for folder in grid(tmp_path, {0.5: 2.0, 2.0: 1.9, 8.0: 2.2})]
    assert main(["advise", *folders]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "Arguments: --optim adamw_torch_fused --weight_decay 1.4"
    monkeypatch.chdir(tmp_path)
    assert main(["advise", "2.0-0"]) == 0
    assert capsys.readouterr().out.startswith("2.0-0: 200 steps")


def test_folder_of_runs_is_its_runs(tmp_path, capsys):
    """As compare_optimizers.py and hyperparameter_search leave it."""
    folders = grid(tmp_path / "runs", {0.5: 2.0, 2.0: 1.9})
    (tmp_path / "runs" / "results.csv").write_text("weight_decay\n")
    (tmp_path / "runs" / "empty").mkdir()
    assert advise([tmp_path / "runs"]).lines == advise(folders).lines
    assert advise([tmp_path / "runs", folders[0]]).lines == advise(folders).lines
    assert main(["advise", str(tmp_path / "runs" / "results.csv")]) == 1
    assert "name the folder of a run, or of several" in capsys.readouterr().err
    assert main(["advise", str(tmp_path / "runs" / "empty")]) == 1
    assert "nor a folder of runs with them" in capsys.readouterr().err


def test_metric_of_one_run_is_told(tmp_path):
    evaluations = [{"eval_loss": 2.0, "eval_accuracy": 0.5}, {"eval_loss": 1.9, "eval_accuracy": 0.625}]
    text = said(write(tmp_path, evaluations, FITTED, weight_decay=0.1, **ADAMW), metric="accuracy")
    assert "eval_accuracy is 0.625; one run does not tell" in text


def test_plot_against_weight_decay_shows_runs_parabola_and_the_next(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from hf_swd.commands import plot_decay

    drawn = []
    save = plot_decay.save_figure
    monkeypatch.setattr(plot_decay, "save_figure", lambda figure, *to: drawn.append(figure) or save(figure, *to))
    folders = [str(folder) for folder in grid(tmp_path, {0.5: 2.0, 2.0: 1.9, 8.0: 2.2})]
    assert main(["plot", *folders, "--against", "weight_decay", "-o", str(tmp_path / "picture.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line.get_xydata() for line in drawn[0].axes[0].lines}
    assert lines["AdamW, one run each"].tolist() == [[0.5, 2.0], [2.0, 1.9], [8.0, 2.2]]
    assert lines["next: 1.4"][0][0] == 1.4
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.5", "1.4", "2", "8"]
    (band,) = (patch for patch in axes.patches if patch.get_label() == "as good as the best, within noise")
    noise = 0.005 * (2.0 + 1.9 + 2.2) / 3
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([1.9 - noise, 1.9 + noise])
    colours = {line.get_label(): line.get_color().upper() for line in drawn[0].axes[0].lines}
    assert colours["AdamW, one run each"] == "#D55E00"  # AdamW's in all pictures
    assert len({colours[name] for name in ("AdamW, one run each", "parabola", "next: 1.4")}) == 3
    box, panel = (part.get_window_extent() for part in (drawn[0].legends[0], drawn[0].axes[0]))
    assert box.y1 < panel.y0  # below it, where no line passes
    for decay, loss in ((0.5, 2.0), (8.0, 2.2)):  # through its points
        assert any(x == pytest.approx(decay) and y == pytest.approx(loss) for x, y in lines["parabola"])
    assert min(y for _, y in lines["parabola"]) < 1.9
    folders = [str(folder) for folder in grid(tmp_path / "none", {0.0: 1.9, 0.5: 2.0, 2.0: 2.1})]
    assert main(["plot", *folders, "--against", "weight_decay"]) == 0
    (stop,) = (line for line in drawn[1].axes[0].lines if "keep" in line.get_label())
    assert stop.get_label() == "keep: 0" and [*stop.get_ydata()] == [1.9, 1.9]
    none = next(line for line in drawn[1].axes[0].lines if line.get_label() == "no weight decay")
    assert [*none.get_ydata()] == [1.9, 1.9] and none.get_linewidth() < stop.get_linewidth()
    assert none.get_zorder() > stop.get_zorder()  # so that both are seen
    folders = [str(folder) for folder in grid(tmp_path / "seeds", {0.5: (2.0, 2.1), 2.0: 1.9})]
    assert main(["plot", *folders, "--against", "weight_decay"]) == 0
    (mean,) = (line for line in drawn[2].axes[0].lines if line.get_label() == "AdamW, mean over the seeds")
    assert mean.get_ydata() == pytest.approx([2.05, 1.9])
    capsys.readouterr()
    other = str(write(tmp_path / "other", [2.0], **{**ADAMW, "learning_rate": 1.0}, weight_decay=1.0))
    assert main(["plot", *folders, other, "--against", "weight_decay"]) == 0
    assert capsys.readouterr().err == f"Left out: {other} (learning_rate=1.0, not None).\n"
    assert main(["plot", str(write(tmp_path / "blind", [], **ADAMW)), "--against", "weight_decay"]) == 1
    assert "no run has an evaluation" in capsys.readouterr().err


# --- runs of an unusual kind ---


OVERFITTED = [2.4, 2.0, 1.8, 1.9, 2.2]
FITTED = [0.5] * 10


def test_adams_without_decay_gets_a_proposal_in_its_own_units(tmp_path):
    """Without `reference_steps` weight decay is divided by the rms; with it, by what that has become of the first."""
    schedule = {"swd/weight_decay": 0.0, "swd/grad_rms": 0.01}
    adamw, paper, calibrated = (
        write(tmp_path / name, OVERFITTED, FITTED, extra=extra, weight_decay=0.0, seed=0, **arguments_)
        for name, extra, arguments_ in (
            ("adamw", None, {"optim": "adamw_torch"}),
            ("paper", schedule, {"optim": "adams"}),
            ("calibrated", schedule, {"optim": "adams", "optim_args": "reference_steps=50"}),
        )
    )
    assert proposed(said(adamw)) == proposed(said(calibrated)) == 0.9  # 1.8 / (200 steps * 0.01)
    assert proposed(said(paper)) == 0.009


def test_a_decay_too_weak_to_matter_beside_none_does_not_end_the_search(tmp_path):
    losses = {0.0: OVERFITTED, 1e-3: [*OVERFITTED[:-1], 2.201]}
    folders = [write(tmp_path / f"{d}", found, FITTED, weight_decay=d, **ADAMW) for d, found in losses.items()]
    assert proposed(said(*folders)) == 0.9


@pytest.mark.parametrize("where", ["evaluation", "training"])
def test_nothing_as_strong_as_what_diverged_is_proposed(tmp_path, where):
    first = write(tmp_path / "1", OVERFITTED, FITTED, weight_decay=1.0, **ADAMW)
    assert proposed(said(first)) > 4
    losses = [0.5] * 5 + [math.nan] * 5 if where == "training" else FITTED
    write(tmp_path / "4", [2.4, math.nan], losses, weight_decay=4.0, **ADAMW)
    text = said(first, tmp_path / "4")
    assert proposed(text) == 2 and "because 4 ended in NaN or infinity" in text
    assert ("NaN or infinite from step 120 on" in text) == (where == "training")


def test_no_step_is_proposed_that_takes_a_tenth_of_the_weights(tmp_path):
    text = said(write(tmp_path / "strong", OVERFITTED, FITTED, weight_decay=8.0, **ADAMW))
    assert proposed(text) == 10 and "more than 10 % of the weights in a step" in text
    text = said(write(tmp_path / "stronger", OVERFITTED, FITTED, weight_decay=50.0, **ADAMW))
    assert proposed(text) == 50 and "Keep 50: a stronger one would take" in text


def test_infinity_in_one_log_is_not_the_end(tmp_path):
    folder = write(tmp_path, [2.0, 1.9], weight_decay=1.0, **ADAMW)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    state["log_history"][0]["grad_norm"] = math.inf  # usual with fp16
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert "NaN or infinite at step 20." in said(folder)


def test_several_evaluation_datasets(tmp_path):
    evaluations = [{"eval_a_loss": 1.0, "eval_a_runtime": 1.0}, {"eval_a_loss": 0.9}]
    folder = write(tmp_path, evaluations, FITTED, weight_decay=0.1, **ADAMW)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    for step, loss in ((100, 1.8), (200, 2.2)):  # an entry of its own, at the same steps
        state["log_history"].append({"step": step, "eval_b_loss": loss})
    state["log_history"].sort(key=lambda entry: entry["step"])
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert "judged: no finite eval_loss was logged; --metric takes eval_a_loss, eval_b_loss." in said(folder)
    assert "ends at its lowest (0.9)" in said(folder, metric="a_loss")
    text = said(folder, metric="b_loss")
    assert "It overfits: the evaluation loss was lowest at step 100 (1.8)" in text, text
    assert proposed(text) > 0.1


def test_direction_of_a_metric_is_that_of_the_runs_arguments(tmp_path):
    folders = [
        write(
            tmp_path / f"{decay}",
            [{"eval_loss": loss, "eval_score": score}] * 2,
            weight_decay=decay,
            metric_for_best_model="score",
            greater_is_better=False,
            **ADAMW,
        )
        for decay, loss, score in ((0.5, 2.0, 8.0), (2.0, 1.9, 7.0), (8.0, 2.2, 9.0))
    ]
    assert "Compared by eval_score at the end; less is better" in said(*folders, metric="score")
    assert "--metric score decides by it" not in said(*folders)


def test_runs_that_were_stopped_say_so_and_early_stopping_is_no_difference(tmp_path):
    def stopped(name, at_best, step, decay):
        folder = write(tmp_path / name, [2.0, 1.9], weight_decay=decay, load_best_model_at_end=at_best, **ADAMW)
        state = json.loads((folder / "trainer_state.json").read_text())
        state |= {"global_step": step, "max_steps": 1000, "epoch": step / 10}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        return folder

    assert ": 200 of 1000 steps, 20 passes" in said(stopped("one", False, 200, 1.0))
    early = [stopped(f"early{step}", True, step, step / 100) for step in (200, 220, 240)]
    assert len(advise(early).settings) == 3
    aborted = [stopped(f"aborted{step}", False, step, step / 100) for step in (200, 220, 240)]
    assert len(advise(aborted).settings) == 1


def test_arguments_are_found_in_a_checkpoint_and_beside_a_link(tmp_path):
    write(tmp_path / "run" / "checkpoint-200", [2.0, 1.9], weight_decay=1.0, **ADAMW)
    state = (tmp_path / "run" / "checkpoint-200" / "trainer_state.json").rename(
        tmp_path / "run" / "trainer_state.json"
    )
    assert read_run(tmp_path / "run").weight_decay == 1.0
    # As the Hub's cache keeps files.
    blob = state.rename(tmp_path / "blob")
    snapshot = write(tmp_path / "snapshot", [], weight_decay=3.0, **ADAMW)
    (snapshot / "trainer_state.json").unlink()
    (snapshot / "trainer_state.json").symlink_to(blob)
    assert read_run(snapshot).weight_decay == 3.0


def test_saved_weights_that_are_not_known_are_no_difference(tmp_path):
    folders = grid(tmp_path, {0.5: 2.0, 2.0: 1.9, 8.0: 2.2})
    save_file({"weight": torch.ones(3)}, folders[0] / "model.safetensors")
    assert len(advise(folders).settings) == 3


def test_long_log_is_read_in_time_that_grows_with_it(tmp_path):
    folder = write(tmp_path, [2.0, 1.9], [1.0] * 20_000, weight_decay=1.0, **ADAMW)
    compared = []

    class Entry(dict):
        def __eq__(self, other):
            compared.append(1)
            return super().__eq__(other)

    run = read_run(folder)
    run.training[:] = map(Entry, run.training)
    assert run.broken == [] and not compared
