"""What runs of a Trainer logged, drawn: loss, gradient norm and effective weight decay over optimizer steps."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_log import Run, read_runs


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Title and label of the value axis. What the loss is, and so its unit, is not in the log.
_PANELS = {
    "loss": ("loss", "loss (cross-entropy: nats)"),
    "grad_norm": ("gradient norm", "L2 norm before clipping"),
    "swd/weight_decay": ("effective weight decay", "the weight_decay that acts in a step"),
}
# Okabe and Ito's colour-blind safe palette without its yellow, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_COLOUR_OF = {"AdamS": "#0072B2", "AdamW": "#D55E00", "Adam": "#CC79A7", "SGD": "#E69F00"}
_NAMES = {"adams": "AdamS", "adam": "Adam", "sgd": "SGD"}
_NAMES |= dict.fromkeys(("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused"), "AdamW")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
_EVALUATION: dict[str, Any] = {"markersize": 4.5, "markerfacecolor": "none"}
_FEW_POINTS = 15
_BEGINNING = 0.1  # of a training: its steep first values are left out where others would be flat beside them
_LEGEND_CHARACTERS = 130


def plot_runs(output_dirs: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None) -> Path:
    """
    Draws loss (training and evaluation), gradient norm and effective weight decay of runs, and saves the picture.

    A run without scheduled weight decay has its constant decay drawn if its `training_args.bin` is there and names an
    optimizer with decoupled decay. The first tenth of a training may leave the panels of loss and gradient norm, whose
    axes the rest fills. Runs are named by optimizer and weight decay, as far as those are known. Where values are NaN
    or infinite, a line along the upper edge begins with a cross, and the legend names the first step. Axes are
    logarithmic where values span more than a decade. No display is needed.

    Args:
        output_dirs (paths): each the `output_dir` of a Trainer, whose own `trainer_state.json` is read or else that of
            its last `checkpoint-N`; or a checkpoint; or a `trainer_state.json`; or a folder of runs. Naming a run
            twice draws it once.
        output (path, *optional*, defaults to `swd_plot.png` in the first of `output_dirs`): image file; its suffix is
            its format.

    Returns:
        `Path`: the file written.

    Raises:
        FileNotFoundError: no `trainer_state.json` where it was looked for.
        ImportError: matplotlib is not installed.
        ValueError: no run, a file that is no trainer state, a log without any of the series, or an unknown image
            format.
    """
    runs = read_runs(output_dirs := [*output_dirs])
    for run in runs:
        _check(run)
    return save_figure(_draw(runs, _names(runs)), Path(output_dirs[0]), output)


# Reading


def _check(run: Run) -> None:
    if not any(run.logged(key) for key in (*_PANELS, "eval_loss")):
        raise ValueError(
            f"{run.state}: log_history has {len(run.history)} entries and none with {', '.join(_PANELS)} or "
            "eval_loss; train with logging_steps smaller than the number of optimizer steps (the Trainer's default is "
            "500)"
        )


def _names(runs: Sequence[Run]) -> list[str]:
    """By optimizer and weight decay; by `optim_args`, seed and folder, too, where runs do not differ in that."""
    folders = _short_names([(run.path if run.path.is_dir() else run.path.parent).resolve() for run in runs])
    names = [
        folder if not run.optim or run.weight_decay is None else f"{name_of(run.optim)} {run.weight_decay:g}"
        for run, folder in zip(runs, folders, strict=True)
    ]
    options = [run.arguments.get("optim_args") or "" for run in runs]
    seeds = [f"seed {run.arguments['seed']}" if "seed" in run.arguments else "" for run in runs]
    for further in (options, seeds, folders):
        if len(set(names)) < len(names) and len(set(further)) > 1:
            # A name that is its folder's is not repeated.
            names = [", ".join(filter(None, dict.fromkeys(parts))) for parts in zip(names, further, strict=True)]
    return names


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""

    def name(own: Path) -> str:
        ends = (own.parts[-count:] for count in range(1, len(own.parts)))
        unique = (end for end in ends if sum(folder.parts[-len(end) :] == end for folder in folders) == 1)
        return os.path.join(*next(unique, own.parts))

    return [name(folder) for folder in folders]


# Drawing


def name_of(optim: str) -> str:
    """What pictures call an optimizer of the Trainer."""
    return _NAMES.get(optim, optim)


def styles_of(optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Colour and line style for each of several lines. An optimizer, as [`name_of`] names it, has one colour in all
    pictures; further lines of the same optimizer are ever lighter and in other styles."""
    from matplotlib.colors import to_hex, to_rgb

    spare = [colour for colour in COLOURS if colour not in [_COLOUR_OF.get(name) for name in optimizers]]
    others = [*dict.fromkeys(name for name in optimizers if name not in _COLOUR_OF)]
    styles = []
    for index, name in enumerate(optimizers):
        before = list(optimizers[:index]).count(name)
        place = 0 if name in _COLOUR_OF else others.index(name)
        white = before * min(0.3, 0.7 / list(optimizers).count(name))
        red, green, blue = (c + white * (1 - c) for c in to_rgb(_COLOUR_OF.get(name, spare[place % len(spare)])))
        styles.append({"color": to_hex((red, green, blue)), "linestyle": _LINES[(place + before) % len(_LINES)]})
    return styles


def require_matplotlib() -> None:
    """Raises an `ImportError` that says what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f'plotting needs matplotlib: pip install "hf-swd[plot]" ({error})') from None


def dress(axes: Axes, label: str) -> None:
    """What all pictures over steps or weight decay look like."""
    axes.set_xlabel(label)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, run: Path, output: str | os.PathLike[str] | None) -> Path:
    """
    Writes the picture, whose format is the suffix of `output`, by default into the folder of a run.

    Raises:
        ValueError: no suffix, or an unknown image format.
    """
    target = (run if run.is_dir() else run.parent) / "swd_plot.png" if output is None else Path(output)
    if not target.suffix:
        raise ValueError(
            f"output={str(target)!r}: expected a file name with the suffix of an image format, such as .png or .pdf"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=200)
    return target


def _draw(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    labels = [*map(_label, runs, names)]
    columns = max(1, min(len(runs), _LEGEND_CHARACTERS // (max(map(len, labels)) + 9)))
    height = 3.3 + 0.19 * math.ceil(len(runs) / columns)
    styles = styles_of([name_of(run.optim) or name for run, name in zip(runs, names, strict=True)])
    # Lines become thinner, so that one which lies on another leaves it visible.
    styles = [{**style, "linewidth": max(2.4 - 0.5 * index, 1.2)} for index, style in enumerate(styles)]
    with rc_context({"font.size": 9, "pdf.fonttype": 42, "svg.fonttype": "none", "axes.axisbelow": True}):
        figure = Figure(figsize=(10, height))
        figure.set_layout_engine("constrained", wspace=0.05)
        for axes, (key, (title, unit)) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            _draw_panel(axes, [*zip(runs, names, styles, strict=True)], key)
            axes.set_title(title)
            axes.set_ylabel(unit, labelpad=8)  # its underscore is deeper than what matplotlib allows for
        handles = [Line2D([], [], **style) for style in styles]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2, frameon=False)
    return figure


def _draw_panel(axes: Axes, runs: Sequence[tuple[Run, str, dict[str, Any]]], key: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    drawn: list[list[tuple[float, float]]] = []  # of each run
    has_evaluations = False
    for index, (run, name, style) in enumerate(runs):
        marker = _MARKERS[index % len(_MARKERS)]
        points = run.logged(key)
        if key == "swd/weight_decay" and not points and run.constant_decay is not None:
            points = [(entry["step"], run.constant_decay) for entry in run.history]
        few: dict[str, Any] = {"marker": marker, "markersize": 4} if len(points) <= _FEW_POINTS else {}
        _draw_line(axes, points, style, label=name, **few)
        drawn.append([*points])
        if key == "loss" and (evaluations := run.logged("eval_loss")):
            has_evaluations = True
            _draw_line(axes, evaluations, style, label=f"{name} (evaluation)", marker=marker, **_EVALUATION)
            drawn[-1] += evaluations
    values = [value for points in drawn for _, value in points]
    if key != "swd/weight_decay":
        values = _set_limits(axes, drawn) or values
    if has_evaluations:
        lines = [Line2D([], [], color="0.3"), Line2D([], [], color="0.3", marker="o", **_EVALUATION)]
        axes.legend(lines, ["training", "evaluation"], frameon=False)
    _set_scale(axes, values)
    dress(axes, "optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if not any(map(math.isfinite, values)):
        words = "NaN or infinite at all steps" if values else "not logged"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color="0.4")
        axes.set_yticks([])
        if not values:
            axes.set_xticks([])


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], style: dict[str, Any], **details: Any) -> None:
    """A curve, and along the upper edge a line over each stretch of points that no curve can show, with a cross where
    it begins."""
    if points:
        axes.plot(*zip(*points, strict=True), **style, **details)
    cross: dict[str, Any] = {"marker": "x", "markevery": [0]}
    edge = axes.get_xaxis_transform()
    for is_finite, stretch in groupby(points, key=lambda point: math.isfinite(point[1])):
        if not is_finite:
            steps = [step for step, _ in stretch]
            axes.plot(steps, [1.0] * len(steps), **style, **cross, transform=edge, clip_on=False)


def _set_limits(axes: Axes, runs: Iterable[Sequence[tuple[float, float]]]) -> list[float]:
    """Limits that the values after the runs' beginnings fill, where those of the beginnings would take a third of the
    axis or more. Returns the finite values that count."""
    values, later = [], []
    for points in runs:
        last = max((step for step, _ in points), default=0)
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        values += [value for _, value in finite]
        later += [value for step, value in finite if step > _BEGINNING * last]
    if not later or max(later) - min(later) >= 0.67 * (max(values) - min(values)) or max(later) > 10 * min(later):
        return values
    margin = 0.05 * (max(later) - min(later)) or 0.05 * abs(later[0])
    axes.set_ylim(min(later) - margin, max(later) + margin)
    return later


def _set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic for more than a decade; zeros, which no logarithm shows, get a linear piece below all others."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [value for value in values if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) < 10 * min(positive):
        return
    if min(values) > 0:
        axes.set_yscale("log")
        steps = (1, 2, 5) if max(positive) < 300 * min(positive) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_yscale("symlog", linthresh=min(positive))


def _label(run: Run, name: str) -> str:
    notes = [
        f"no {what} logged"
        for key, what in (("loss", "training loss"), ("grad_norm", "gradient norm"))
        if not run.logged(key)
    ]
    if not run.logged("swd/weight_decay") and run.constant_decay is None:
        notes.append("weight decay not known")
    points = [point for key in (*_PANELS, "eval_loss") for point in run.logged(key) if not math.isfinite(point[1])]
    if points:
        step, value = min(points, key=lambda point: point[0])
        notes.append(f"first {'NaN' if math.isnan(value) else 'infinity'} at step {step:g}")
    label = f"{name} ({', '.join(notes)})" if notes else name
    # A dollar would begin a formula, and matplotlib leaves out labels that begin with an underscore.
    return re.sub("^_", "\u200b_", textwrap.fill(label, _LEGEND_CHARACTERS).replace("$", r"\$"))
