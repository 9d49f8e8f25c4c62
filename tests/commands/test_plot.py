"""hf_swd.commands.plot: what is drawn is what a Trainer logged, and every way of not finding it says what was looked
for."""

from __future__ import annotations

import json
import math
import pickle
import sys
import zipfile
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hf_utils import arguments, sentences, tiny_bert
from transformers import Trainer

import hf_swd
from hf_swd.commands import plot
from hf_swd.commands.launch import main
from hf_swd.commands.plot import plot_runs


to_rgb = pytest.importorskip("matplotlib.colors", reason="needs the extra: plot").to_rgb


@pytest.fixture
def figures(monkeypatch):
    """The figures that `plot_runs` draws, as it draws them."""
    drawn = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda *runs: drawn.append(draw(*runs)) or drawn[-1])
    return drawn


def write_state(folder, log, name="trainer_state.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"log_history": log}))
    return folder


def log_of(values, key="loss"):
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


def lines(figure):
    """Points of every line of every panel, by the title of the panel and the label of the line."""
    return {
        axes.get_title(): {
            line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines
        }
        for axes in figure.axes
    }


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def series(log, key):
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def test_plot_of_two_real_trainings_shows_their_logs(tmp_path, figures, capsys):
    data = sentences()
    for optim, changes in (("adams", {}), ("adamw_torch", {"optim_args": None})):
        args = arguments(
            tmp_path / optim, optim=optim, eval_strategy="steps", eval_steps=3, save_strategy="steps", **changes
        )
        Trainer(tiny_bert(), args, train_dataset=data, eval_dataset=data[:8]).train()
    capsys.readouterr()

    assert main(["plot", str(tmp_path / "adams"), str(tmp_path / "adamw_torch")]) == 0
    path = tmp_path / "adams" / "swd_plot.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")

    logs = {
        optim: json.loads((tmp_path / optim / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        for optim in ("adams", "adamw_torch")
    }
    panels = lines(figures[0])
    for optim, log in logs.items():
        assert len(series(log, "loss")) == 6
        name = {"adams": "AdamS 0.01", "adamw_torch": "AdamW 0.01"}[optim]
        assert panels["loss"][name] == series(log, "loss")
        assert panels["loss"][f"{name} (evaluation)"] == series(log, "eval_loss")
        assert panels["gradient norm"][name] == series(log, "grad_norm")
    assert panels["effective weight decay"]["AdamS 0.01"] == series(logs["adams"], "swd/weight_decay")
    assert {value for _, value in panels["effective weight decay"]["AdamW 0.01"]} == {0.01}
    assert legend(figures[0]) == ["AdamS 0.01", "AdamW 0.01"]


@pytest.mark.parametrize("optim", ["ademamix", "adafactor", "lion_8bit"])
def test_constant_decay_of_any_optimizer_that_decouples_it_is_drawn(tmp_path, figures, optim):
    write_state(tmp_path, log_of([1.0, 2.0]))
    (tmp_path / "training_args.json").write_text(json.dumps({"optim": optim, "weight_decay": 0.3}))
    plot_runs([tmp_path])
    (points,) = lines(figures[0])["effective weight decay"].values()
    assert [*points] == [(1, 0.3), (2, 0.3)]


def test_last_checkpoint_is_the_one_with_the_highest_number(tmp_path, figures):
    for steps in (8, 90, 100):
        write_state(tmp_path / f"checkpoint-{steps}", log_of([1.0] * steps))
    write_state(tmp_path / "checkpoint-200-old", log_of([1.0] * 200))
    (tmp_path / "checkpoint-300").mkdir()  # one whose saving was interrupted
    plot_runs([tmp_path])
    assert len(lines(figures[0])["loss"][tmp_path.name]) == 100


def test_state_in_the_folder_comes_before_checkpoints_and_may_be_named_directly(tmp_path, figures):
    write_state(tmp_path, log_of([3.0]))
    write_state(tmp_path / "checkpoint-9", log_of([4.0] * 9))
    for argument in (tmp_path, tmp_path / "trainer_state.json"):
        assert plot_runs([argument]) == tmp_path / "swd_plot.png"
        assert lines(figures[-1])["loss"] == {tmp_path.name: [(1, 3.0)]}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        pytest.param(["runs/adams", "runs/adamw"], ["adams", "adamw"], id="last-part"),
        pytest.param(["a/out", "b/out", "c"], ["a/out", "b/out", "c"], id="only-as-long-as-needed"),
        pytest.param(["a/x/out", "b/x/out"], ["a/x/out", "b/x/out"], id="three-parts"),
        pytest.param(["a", "a"], ["a"], id="twice-the-same"),
        pytest.param(["_a", "$b$"], ["\u200b_a", r"\$b\$"], id="marks-that-matplotlib-interprets"),
    ],
)
def test_legend_has_the_shortest_distinguishing_names(tmp_path, figures, folders, names):
    for folder in folders:
        write_state(tmp_path / folder, [{"step": 1, "loss": 1.0, "grad_norm": 1.0, "swd/weight_decay": 1.0}])
    plot_runs([tmp_path / folder for folder in folders])
    assert legend(figures[0]) == names


def write_run(folder, optim, weight_decay, optim_args=None, **more):
    write_state(folder, [{"step": 1, "loss": 1.0, "grad_norm": 1.0, "swd/weight_decay": 1.0}])
    arguments = {"optim": optim, "weight_decay": weight_decay, "optim_args": optim_args, **more}
    (folder / "training_args.json").write_text(json.dumps(arguments))
    return folder


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([("adams", 2.0), ("adamw_torch_fused", 0.1), ("lion", 0.1)], ["AdamS 2", "AdamW 0.1", "lion 0.1"]),
        (
            [("adams", 2.0, "reference_steps=9"), ("adams", 2.0), ("adamw_torch", 2.0)],
            ["AdamS 2, reference_steps=9", "AdamS 2", "AdamW 2"],
        ),
        ([("adams", 2.0), ("adams", 2.0), ("adamw_torch", 2.0)], ["AdamS 2, 0", "AdamS 2, 1", "AdamW 2, 2"]),
    ],
)
def test_runs_are_named_by_optimizer_and_weight_decay(tmp_path, figures, runs, names):
    plot_runs([write_run(tmp_path / str(index), *run) for index, run in enumerate(runs)])
    assert legend(figures[0]) == names


def test_seeds_that_differ_are_named_before_folders(tmp_path, figures):
    runs = [write_run(tmp_path / f"{seed}", "adams", 2.0, "reference_steps=9", seed=seed) for seed in (7, 8)]
    plot_runs(runs)
    assert legend(figures[0]) == ["AdamS 2, seed 7", "AdamS 2, seed 8"]
    plot_runs([runs[0], write_run(tmp_path / "again", "adams", 2.0, "reference_steps=9", seed=7)])
    assert legend(figures[1]) == ["AdamS 2, 7", "AdamS 2, again"]


def test_lines_of_one_optimizer_differ_in_shade(tmp_path, figures):
    plot_runs([write_run(tmp_path / f"{seed}", "adams", 2.0, seed=seed) for seed in range(9)])
    lightness = [sum(to_rgb(line.get_color())) for line in figures[0].axes[0].lines]
    assert all(after - before > 0.05 for before, after in pairwise(lightness)) and lightness[-1] < 2.5


def test_label_of_a_logarithmic_axis_keeps_off_its_ticks(tmp_path, figures):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot_runs([write_state(tmp_path, log_of([0.1, 0.5, 2.0], "swd/weight_decay"))])
    FigureCanvasAgg(figures[0]).draw()
    panel = figures[0].axes[2]
    bottom, top = panel.get_ylim()
    shown = [t.label1.get_window_extent() for t in panel.yaxis.get_major_ticks() if bottom <= t.get_loc() <= top]
    points = 72 / figures[0].dpi
    assert points * (min(box.x0 for box in shown) - panel.yaxis.label.get_window_extent().x1) > 6


def test_an_optimizer_has_one_colour_in_all_pictures(tmp_path, figures):
    adamw, weaker, adams, lion = (
        write_run(tmp_path / f"{index}", *run)
        for index, run in enumerate([("adamw_torch", 2.0), ("adamw_torch", 0.1), ("adams", 2.0), ("lion", 2.0)])
    )
    for folders in ([adams, adamw], [lion, adamw, adams], [adamw, weaker]):
        plot_runs(folders)
    styles = [
        {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
        for figure in figures
    ]
    assert styles[0]["AdamW 2"] == styles[1]["AdamW 2"] == styles[2]["AdamW 2"] != styles[2]["AdamW 0.1"]
    assert styles[0]["AdamS 2"] == styles[1]["AdamS 2"]
    assert len({colour for colour, _ in styles[1].values()}) == 3


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        pytest.param([50.0, 20.0] + [2.0, 1.0] * 9, 2.05, id="steep-beginning"),
        pytest.param([1.0, 50.0] + [1.0] * 18, 1.05, id="constant-rest"),
        pytest.param([2.2] + [2.0, 1.0] * 10, None, id="all-alike"),
        pytest.param([50.0, 40.0] + [20.0, 1.0] * 9, None, id="decades-have-a-logarithmic-axis"),
    ],
)
def test_a_steep_beginning_does_not_take_the_axis(tmp_path, figures, values, limit):
    plot_runs([write_state(tmp_path, log_of(values))])
    upper = figures[0].axes[0].get_ylim()[1]
    assert upper == pytest.approx(limit) if limit else upper > max(values)


def test_a_short_run_beside_a_long_one_is_all_seen(tmp_path, figures):
    """It lies within the first tenth of the other, which is not its own beginning."""
    long = write_state(tmp_path / "long", log_of([50.0, 20.0] + [2.0, 1.0] * 9))
    short = write_state(tmp_path / "short", [{**entry, "step": 1} for entry in log_of([9.0])])
    plot_runs([long, short])
    assert 9.0 < figures[0].axes[0].get_ylim()[1] < 20.0


def test_runs_differ_in_colour_and_in_line_style(tmp_path, figures):
    folders = [write_state(tmp_path / str(index), log_of([1.0, 2.0])) for index in range(9)]
    plot_runs(folders)
    styles = [(line.get_color(), line.get_linestyle()) for line in figures[0].axes[0].lines]
    assert len(set(styles)) == 9
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in zip(styles, styles[1:], strict=False))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        pytest.param([1.0, 9.0], "linear", id="less-than-a-decade"),
        pytest.param([0.1, 9.0], "log", id="decades"),
        pytest.param([0.1, math.nan, math.inf, 9.0], "log", id="not-finite"),
        pytest.param([0.0, 0.1, 9.0], "symlog", id="decades-and-zero"),
        pytest.param([-1.0, 0.1, 9.0], "linear", id="negative"),
        pytest.param([0.0, 0.0], "linear", id="zeros"),
    ],
)
def test_scale_fits_the_values(tmp_path, figures, values, scale):
    plot_runs([write_state(tmp_path, log_of(values))])
    assert figures[0].axes[0].get_yscale() == scale


def test_what_a_run_did_not_log_is_said(tmp_path, figures):
    folders = [write_state(tmp_path / "a", log_of([1.0])), write_state(tmp_path / "b", log_of([2.0], "eval_loss"))]
    plot_runs(folders)
    assert legend(figures[0]) == [
        "a (no gradient norm logged, weight decay not known)",
        "b (no training loss logged, no gradient norm logged, weight decay not known)",
    ]
    assert [text.get_text() for text in figures[0].axes[1].texts] == ["not logged"]


def marks(axes):
    """Steps of the lines along the upper edge of a panel: one list for each stretch without a curve."""
    return [
        line.get_xdata().tolist()
        for line in axes.lines
        if line.get_marker() == "x" and set(line.get_ydata()) == {1.0} and line.get_transform() != axes.transData
    ]


def test_nan_and_infinity_are_marked_and_named(tmp_path, figures):
    norms = [1.0, 2.0, math.nan, 3.0, math.inf, math.nan]
    log = [{"step": step, "loss": 1.0, "grad_norm": norm} for step, norm in enumerate(norms, start=1)]
    log += [{"step": 6, "eval_loss": math.nan}]
    plot_runs([write_state(tmp_path / "nan", log), write_state(tmp_path / "inf", log_of([5.0, math.inf, 5.0]))])

    loss, norm, decay = figures[0].axes
    assert (marks(loss), marks(norm), marks(decay)) == ([[6], [2]], [[3], [5, 6]], [])
    assert legend(figures[0]) == [
        "nan (weight decay not known, first NaN at step 3)",
        "inf (no gradient norm logged, weight decay not known, first infinity at step 2)",
    ]
    assert [text.get_text() for text in loss.texts + norm.texts] == []


def test_axis_reaches_as_far_as_a_run_that_went_nan(tmp_path, figures):
    plot_runs([write_state(tmp_path, log_of([1.0] * 5 + [math.nan] * 15))])
    assert marks(figures[0].axes[0]) == [list(range(6, 21))]
    assert figures[0].axes[0].get_xlim()[1] > 20


def test_panel_without_a_finite_value_says_so(tmp_path, figures):
    log = [{"step": step, "loss": 1.0, "swd/weight_decay": math.nan} for step in (1, 2)]
    plot_runs([write_state(tmp_path, log)])
    assert [[text.get_text() for text in axes.texts] for axes in figures[0].axes] == [
        [],
        ["not logged"],
        ["NaN or infinite at all steps"],
    ]


class _Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: arguments("x", weight_decay=0.3), id="adams-whose-decay-is-not-constant"),
        pytest.param(lambda: arguments("x", optim="sgd", optim_args=None, weight_decay=0.3), id="not-decoupled"),
        pytest.param(lambda: SimpleNamespace(optim=_Malicious(), weight_decay=0.3), id="code"),
        pytest.param(None, id="damaged"),
    ],
)
def test_weight_decay_that_is_not_known_to_be_constant_is_not_drawn(tmp_path, figures, content):
    write_state(tmp_path, log_of([1.0]))
    if content is None:
        (tmp_path / "training_args.bin").write_bytes(b"no archive")
    elif isinstance(content(), SimpleNamespace):
        with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content(), protocol=2))
    else:
        torch.save(content(), tmp_path / "training_args.bin")
    plot_runs([tmp_path])
    assert lines(figures[0])["effective weight decay"] == {}
    assert "weight decay not known" in legend(figures[0])[0]


def test_output_is_written_where_and_as_named(tmp_path):
    write_state(tmp_path, log_of([1.0, 2.0]))
    path = plot_runs([tmp_path], tmp_path / "new" / "figure.pdf")
    assert path == tmp_path / "new" / "figure.pdf"
    assert path.read_bytes().startswith(b"%PDF")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    write_state(tmp_path, log_of([1.0]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path)]) == 1
    assert 'pip install "hf-swd[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, ["found neither trainer_state.json nor checkpoint-N/trainer_state.json"], id="no-state"),
        pytest.param('{"log_history": []}', ["has 0 entries", "logging_steps"], id="empty-log"),
        pytest.param(
            '{"log_history": [{"step": 9, "train_loss": 1.0}]}', ["has 1 entries", "grad_norm"], id="summary-only"
        ),
        pytest.param('{"log_history": [{"st', ["not a trainer state in JSON", "JSONDecodeError"], id="truncated"),
        pytest.param("[1, 2]", ["not a trainer state in JSON"], id="other-json"),
        pytest.param('{"log_history": ' + "[" * 200_000, ["not a trainer state in JSON", "Recursion"], id="deep"),
        pytest.param('{"log_history": [{"loss": 1.0}]}', ["not a trainer state in JSON", "step"], id="no-step"),
    ],
)
def test_unusable_folder_is_an_error_that_names_it(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["plot", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in ["hf-swd plot:", str(tmp_path), *words]), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("output_dirs", "output", "message"),
    [
        pytest.param([], None, r"output_dirs=\[\]", id="no-run"),
        pytest.param(["missing"], None, "missing: no such folder or file", id="missing-folder"),
        pytest.param(["."], "figure", "output='figure'.*suffix", id="no-suffix"),
        pytest.param(["."], "figure.docx", "docx", id="unknown-format"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, output_dirs, output, message):
    monkeypatch.chdir(tmp_path)
    write_state(tmp_path, log_of([1.0]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plot_runs(output_dirs, output)


def test_version_and_help_of_the_command_line(capsys):
    for option, text in (("--version", f"hf-swd {hf_swd.__version__}\n"), ("--help", "plot")):
        with pytest.raises(SystemExit) as exit:
            main([option])
        assert exit.value.code == 0
        assert text in capsys.readouterr().out


def test_metric_without_the_picture_that_has_it_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path), "--metric", "accuracy"])
    assert "--metric needs --against weight_decay" in capsys.readouterr().err
