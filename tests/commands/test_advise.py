"""hf-swd advise: what it says of real runs is what they did, and of a log that cannot tell, why not."""

from __future__ import annotations

import json
import math
import re

import pytest
from hf_utils import arguments, sentences, tiny_bert
from transformers import Trainer

import hf_swd  # noqa: F401 - registers optim="adams"
from hf_swd.commands.advise import Settings, advise
from hf_swd.commands.forecast import effective_decays, total_decay
from hf_swd.commands.launch import main


STEPS = 24
NO_CLIPPING = 1e9  # with 0, transformers before 5.3 logs no norm


def train(folder, **changes):
    """A run that logs every step; its folder."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS, "weight_decay": 0.2, **changes}
    Trainer(tiny_bert(), arguments(folder, **settings), train_dataset=sentences()).train()
    return folder


def said(folder, settings=None) -> str:
    return "\n".join(advise(folder, settings).lines)


def logs_of(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "grad_norm" in entry]


RUNS = {
    "calibrated": {"optim_args": "reference_steps=5", "max_grad_norm": NO_CLIPPING},
    "paper": {"optim_args": None, "max_grad_norm": NO_CLIPPING, "weight_decay": 5e-4},
    "clipped": {"optim_args": "reference_steps=5", "max_grad_norm": 0.4},
    "unclipped": {"optim_args": "reference_steps=5,unclipped_norm=true", "max_grad_norm": 0.4},
    "faster": {"optim_args": "reference_steps=5", "max_grad_norm": NO_CLIPPING, "adam_beta2": 0.9},
    "memory-of-its-own": {
        "optim_args": "base=adamw_torch,reference_steps=5,schedule_beta2=0.9",
        "max_grad_norm": NO_CLIPPING,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_simulation_of_a_run_that_logs_every_step_is_what_it_did(tmp_path, name):
    lines = said(train(tmp_path, **RUNS[name])).splitlines()
    (accuracy,) = [line for line in lines if line.startswith("This run logged its effective decay.")]
    assert float(accuracy.split()[-4]) < 0.01  # per cent, at most; norms in the log are float32
    assert accuracy in said(tmp_path, Settings(weight_decay=3.0, reference_steps=2))  # of the run, whatever is asked


def test_decay_of_adams_is_told_from_the_run_of_adamw_beside_it(tmp_path):
    same = {"max_grad_norm": NO_CLIPPING, "learning_rate": 1e-4}
    adamw = train(tmp_path / "adamw", optim="adamw_torch_fused", optim_args=None, **same)
    adams = train(tmp_path / "adams", optim_args="reference_steps=5", **same)
    predicted = advise(adamw, Settings(reference_steps=5)).simulated
    assert predicted == pytest.approx([entry["swd/weight_decay"] for entry in logs_of(adams)], rel=0.01)
    assert predicted[-1] != pytest.approx(0.2, rel=0.05)


def test_logs_of_every_fifth_step_tell_a_gradient_that_changes_slowly():
    norms = [1 + 0.5 * math.sin(t / 40) for t in range(1, 201)]
    options = {"weight_decay": 0.1, "reference_steps": 20, "beta2": 0.99}
    every = effective_decays(range(1, 201), norms, **options)
    fifth = effective_decays(range(5, 201, 5), norms[4::5], **options)
    assert fifth == pytest.approx(every[4::5], rel=0.01)


@pytest.mark.parametrize("unclipped", [False, True])
def test_rms_that_adams_logged_tells_the_decay_whatever_happens_between_logs(tmp_path, unclipped):
    """A spike at a step that is not logged: norms do not know of it, the logged rms does."""
    spike, steps = 7, 20
    norms = [50.0 if t == spike else 1 + 0.1 * math.sin(t) for t in range(1, steps + 1)]
    options = {"weight_decay": 0.4, "reference_steps": 5, "beta2": 0.9}
    truth = effective_decays(range(1, steps + 1), norms, **options)[4::5]
    rms = effective_decays(range(1, steps + 1), norms, weight_decay=1.0, reference_steps=0, beta2=0.9)[4::5]
    log = [
        {"step": t, "grad_norm": norms[t - 1], "learning_rate": 0.1, "swd/grad_rms": 1 / one, "swd/weight_decay": one}
        for t, one in zip(range(5, steps + 1, 5), rms, strict=True)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    arguments_ = {"optim": "adams", "adam_beta2": 0.9, "max_grad_norm": 1.0 if unclipped else 0.0}
    arguments_["optim_args"] = "unclipped_norm=true" if unclipped else None
    (tmp_path / "training_args.json").write_text(json.dumps(arguments_))
    found = advise(tmp_path, Settings(weight_decay=0.4, reference_steps=5))
    assert found.simulated == pytest.approx(truth) and "rms that the run logged" in "\n".join(found.lines)
    later = advise(tmp_path, Settings(weight_decay=0.4, reference_steps=10)).simulated
    options["reference_steps"] = 10
    assert later == pytest.approx(effective_decays(range(1, steps + 1), norms, **options)[4::5])
    paper = advise(tmp_path, Settings(weight_decay=0.4, reference_steps=0))
    assert paper.simulated == pytest.approx([0.4 * one for one in rms])
    # A schedule that followed clipped gradients tells nothing of one that does not.
    (tmp_path / "training_args.json").write_text(json.dumps({**arguments_, "max_grad_norm": 1.0, "optim_args": None}))
    assert "from logged norms alone" in said(tmp_path, Settings(weight_decay=0.4, reference_steps=5))


def test_shrinkage_is_the_sum_over_the_learning_rate_schedule(tmp_path):
    folder = train(tmp_path, optim="adamw_torch", optim_args=None, learning_rate=0.01)
    # Linear to zero. Versions of transformers differ by one step in the rate that they log.
    total = sum(0.01 * (1 - t / STEPS) * 0.2 for t in range(STEPS))
    log = advise(folder).log
    assert total_decay(log.steps, log.rates, [0.2] * STEPS) == pytest.approx(total, rel=0.05)
    (shrank,) = re.findall(r"shrank the weights by ([\d.]+) %", said(folder))
    assert float(shrank) == pytest.approx(100 * (1 - math.exp(-total)), rel=0.05)


def test_saved_parameters_are_those_of_the_model(tmp_path):
    log = advise(train(tmp_path, max_steps=STEPS)).log
    assert log.num_parameters == sum(p.numel() for p in tiny_bert().parameters())
    assert (log.optim, log.weight_decay, log.beta2, log.max_grad_norm) == ("adams", 0.2, 0.999, 1.0)


# Made-up logs


def write(folder, norms, rate=1e-3, extra=None, **arguments_):
    folder.mkdir(parents=True, exist_ok=True)
    log = [
        {"step": 10 * i, "loss": 1.0, "grad_norm": norm, "learning_rate": rate, **(extra or {})}
        for i, norm in enumerate(norms, start=1)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if arguments_:
        (folder / "training_args.json").write_text(json.dumps(arguments_))
    return folder


ADAMW = {"optim": "adamw_torch_fused", "weight_decay": 0.01, "max_grad_norm": 1.0}


def test_decay_that_did_not_matter(tmp_path):
    # 300 steps of 1e-3 x 0.01
    text = said(write(tmp_path, [0.5] * 30, **ADAMW))
    assert "shrank the weights by 0.3 % in all: it did not matter, whatever the optimizer. 10 % would take" in text
    assert "weight_decay=0.35, or 35 times the steps" in text
    assert "will change nothing" in text


def test_decay_that_mattered_and_would_hardly_move(tmp_path):
    text = said(write(tmp_path, [0.5] * 30, rate=0.1, **ADAMW))
    assert "shrank the weights by 25.9 % in all: enough to matter" in text
    assert "expect AdamW's result" in text


def test_clipped_steps_and_what_would_not_clip(tmp_path):
    text = said(write(tmp_path, [2.0] * 27 + [0.5, 8.0, 31.4], rate=0.1, **ADAMW))
    assert "29 of 30 logged steps were clipped to 1: a schedule by the clipped gradient would be constant" in text
    assert "max_grad_norm=8 would clip 5 % of them, 32 none" in text
    assert "--optim_args reference_steps=100,unclipped_norm=true" in text
    text = said(write(tmp_path, [2.0] * 15 + [0.5] * 15, rate=0.1, **ADAMW))
    assert "15 of 30 logged steps were clipped to 1: a schedule by the clipped gradient can move" in text
    assert "unclipped_norm" not in text


def test_reference_steps_are_the_warm_up_or_part_of_a_short_run(tmp_path):
    for count, given, expected in (
        (60, {"warmup_steps": 150}, 150),
        (60, {"warmup_ratio": 0.25}, 150),
        (60, {"warmup_steps": 0.25}, 150),
        (60, {"warmup_steps": 250}, 200),
        (60, {"warmup_steps": 10}, 100),
        (60, {}, 100),
        (6, {}, 20),
    ):
        text = said(write(tmp_path, [0.5] * count, **ADAMW, **given))
        assert re.search(rf"--optim_args reference_steps={expected} ", text)


def test_mean_decay_is_the_constant_one_that_shrinks_as_much(tmp_path):
    folder = write(tmp_path, [2.0] * 5 + [1.0] * 5, **{**ADAMW, "adam_beta2": 0.5, "max_grad_norm": 0.0})
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry["learning_rate"] = 0.1 if entry["step"] <= 50 else 1e-6
    (folder / "trainer_state.json").write_text(json.dumps(state))
    found = advise(folder, Settings(weight_decay=0.3, reference_steps=10))
    (mean,) = re.findall(r"([\d.]+) in the mean", "\n".join(found.lines))
    assert max(found.simulated) > 0.55 and float(mean) == pytest.approx(
        0.3, rel=0.1
    )  # nothing moves in the second half
    assert "beside AdamW at the same mean decay, 0.3" in found.lines[-1]


def test_optimizer_below_the_schedule_is_kept(tmp_path):
    adams = train(tmp_path / "adams", optim_args="base=adamw_torch,schedule_beta2=0.9,reference_steps=5")
    options = "base=adamw_torch,schedule_beta2=0.9,reference_steps=5"
    assert re.search(f"--optim adams --weight_decay 0.2 --optim_args {options}[, ]", said(adams))
    other = train(tmp_path / "adafactor", optim="adafactor", optim_args=None)
    assert re.search("--optim_args base=adafactor,reference_steps=8[, ]", said(other))
    adamw = train(tmp_path / "adamw", optim="adamw_torch_fused", optim_args=None)
    assert re.search("--optim_args reference_steps=8[, ]", said(adamw))


def test_paper_schedule_needs_the_number_of_parameters(tmp_path):
    folder = write(tmp_path, [0.5] * 30, rate=0.1, **ADAMW)
    assert "give --num_parameters" in said(folder, Settings(weight_decay=5e-4, reference_steps=0))
    text = said(folder, Settings(weight_decay=5e-4, reference_steps=0, num_parameters=10_000))
    assert "an effective decay of 0.1 to 0.1" in text  # 5e-4 / (0.5 / 100)


def test_log_that_becomes_nan_says_from_where(tmp_path):
    text = said(write(tmp_path, [0.5] * 5 + [math.nan] * 5 + [math.inf], **ADAMW))
    assert "From step 60 on, logs are NaN or infinite" in text
    assert "100 steps" not in text.splitlines()[0] or "5 of them logged" in text


def test_unknown_arguments_are_called_unknown(tmp_path):
    text = said(write(tmp_path, [0.5] * 10))
    assert "unknown optimizer, unknown weight_decay, unknown max_grad_norm, unknown size" in text
    assert "Whether steps were clipped is not known" in text
    assert "ask again with --weight_decay" in text
    text = said(write(tmp_path, [0.5] * 10, optim="sgd", weight_decay=0.1, max_grad_norm=0.0))
    assert "sgd is not known to have decoupled decay" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "not a trainer state"),
        ('{"log_history": 3}', "not a trainer state"),
        ("\x00", "not a trainer state"),
        ('{"log_history": []}', "0 of its logs have a grad_norm"),
        (json.dumps({"log_history": [{"step": 1, "grad_norm": 1.0, "learning_rate": 0.1}]}), "1 of its logs have"),
        (json.dumps({"log_history": [{"step": s, "loss": 1.0} for s in (1, 2)]}), "0 of its logs have a grad_norm"),
    ],
)
def test_foreign_and_short_logs_get_one_sentence(tmp_path, capsys, content, message):
    (tmp_path / "trainer_state.json").write_text(content)
    assert main(["advise", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-swd advise: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [str(write(tmp_path / name, [0.5, 0.7, 0.4], **ADAMW)) for name in "ab"]
    picture = tmp_path / "picture.png"
    assert main(["advise", *folders, "--weight_decay", "0.3", "--reference_steps", "5", "--plot", str(picture)]) == 0
    output = capsys.readouterr().out
    assert output.count("--optim adams --weight_decay 0.3 --optim_args reference_steps=5") == 2
    assert output.endswith(f"{picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["advise", *folders, "--plot", str(tmp_path / "picture")]) == 1
    assert "suffix of an image format" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["advise", *folders, "--weight_decay", "-1"])
    assert "expected a number of at least 0" in capsys.readouterr().err
