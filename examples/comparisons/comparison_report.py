"""What compare_optimizers.py makes of its finished runs: table, paired differences, plot."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import mean_and_error

from hf_swd.commands.plot import COLOURS


MARKERS = "os^Dv<>"
NUM_LAST_LOGS = 5  # the gradient norm of a single step is mostly noise
# Effective decays no further apart are called equal.
SAME_DECAY = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A column of the results."""

    key: str
    label: str
    larger_is_better: bool = False


def measures_of(metric: Measure) -> list[Measure]:
    """The columns of the table: the metric first."""
    best = Measure(f"best_{metric.key}", f"best {metric.label}", metric.larger_is_better)
    loss = [] if metric.key == "eval_loss" else [Measure("eval_loss", "validation loss")]
    others = {
        "final_train_loss": "training loss",
        "final_grad_norm": "gradient norm",
        "weight_norm": "weight norm",
        "mean_weight_decay": "mean decay",
        "final_weight_decay": "final decay",
    }
    return [metric, best, *loss, *(Measure(key, label) for key, label in others.items())]


def settings_of(rows: list[Row]) -> dict[str, list[float]]:
    """The weight decays of each optimizer, as they come."""
    found: dict[str, dict[float, None]] = defaultdict(dict)
    for row in rows:
        found[row["optimizer"]][row["weight_decay"]] = None
    return {optimizer: [*decays] for optimizer, decays in found.items()}


def column(rows: list[Row], optimizer: str, decay: float, key: str) -> dict[int, float]:
    """Value of each seed."""
    return {row["seed"]: row[key] for row in rows if (row["optimizer"], row["weight_decay"]) == (optimizer, decay)}


def mean_of(rows: list[Row], optimizer: str, decay: float, key: str) -> float:
    return statistics.fmean(column(rows, optimizer, decay, key).values())


def best_settings(rows: list[Row], metric: Measure) -> dict[str, float]:
    """Of each optimizer the weight decay with the best mean of the metric; ties go to the smaller, and what is not a
    number is never the best."""
    sign = 1 if metric.larger_is_better else -1

    def rank(optimizer: str, decay: float) -> float:
        mean = sign * mean_of(rows, optimizer, decay, metric.key)
        return -math.inf if math.isnan(mean) else mean

    return {
        optimizer: max(sorted(decays), key=lambda decay: rank(optimizer, decay))
        for optimizer, decays in settings_of(rows).items()
    }


def paired_difference(rows: list[Row], one: tuple[str, float], other: tuple[str, float], key: str) -> str:
    """`one` minus `other`, mean ± standard error over the seeds that both have."""
    values, subtracted = column(rows, *one, key), column(rows, *other, key)
    seeds = sorted(values.keys() & subtracted)
    if not seeds:  # a second call may have asked for others
        return "no seed in common"
    mean, error = mean_and_error([values[seed] - subtracted[seed] for seed in seeds])
    return f"{mean:+.3g}{plus_minus(error)}"


def plus_minus(error: float) -> str:
    """Of a single seed there is none."""
    return "" if math.isnan(error) else f" ± {error:.2g}"


def of_same_decay(rows: list[Row], optimizer: str, decay: float, reference: str) -> float | None:
    """The weight decay of `reference` whose effective mean is nearest to that of this setting, if they are equal."""
    mean = mean_of(rows, optimizer, decay, "mean_weight_decay")
    means = {other: mean_of(rows, reference, other, "mean_weight_decay") for other in settings_of(rows)[reference]}
    nearest = min(means, key=lambda other: abs(means[other] - mean))
    return nearest if abs(means[nearest] - mean) <= SAME_DECAY * mean else None


def interpolated_best(rows: list[Row], optimizer: str, metric: Measure) -> tuple[float, float] | None:
    """Weight decay and metric at the vertex of the parabola, over the logarithm of the decay, through the best decay
    of the grid and its neighbours; `None` where the best is at an end of the grid."""
    decays = sorted(decay for decay in settings_of(rows)[optimizer] if decay > 0)
    best = best_settings(rows, metric)[optimizer]
    place = decays.index(best) if best in decays else 0
    if not 0 < place < len(decays) - 1:
        return None
    near = decays[place - 1 : place + 2]
    left, middle, right = (mean_of(rows, optimizer, decay, metric.key) for decay in near)
    a, b = math.log(near[0] / best), math.log(near[2] / best)
    # y = middle + slope * x + curvature * x^2, with x = log(decay / best)
    curvature = ((right - middle) / b - (left - middle) / a) / (b - a)
    slope = (right - middle) / b - curvature * b
    if curvature == 0 or math.isnan(curvature):
        return None
    vertex = -slope / (2 * curvature)
    return best * math.exp(vertex), middle + slope * vertex + curvature * vertex**2


# --- table ---


def table(rows: list[Row], metric: Measure) -> str:
    best, settings, measures = best_settings(rows, metric), settings_of(rows), measures_of(metric)
    lines = [
        f"| optimizer | weight decay | seeds | {' | '.join(measure.label for measure in measures)} |",
        "|---|---:|---:|" + "---:|" * len(measures),
    ]
    for optimizer, decays in settings.items():
        for decay in sorted(decays):
            values = [list(column(rows, optimizer, decay, measure.key).values()) for measure in measures]
            cells = [f"{mean:.4g}{plus_minus(error)}" for mean, error in map(mean_and_error, values)]
            name = "adam" if optimizer == "adamw" and decay == 0 else optimizer
            mark = " (best)" if best[optimizer] == decay else ""
            lines.append(f"| {name} | {decay:g}{mark} | {len(values[0])} | {' | '.join(cells)} |")
    lines += [
        "",
        "± is the standard error over the seeds. Training loss and gradient norm (before clipping): mean of the last "
        f"{NUM_LAST_LOGS} logs. Weight norm: of all weights with two or more dimensions. Mean and final decay: the "
        "effective one, over the logs of a run weighted by the learning rate, and in the last.",
    ]
    reference, *others = settings
    for optimizer in others:
        lines += ["", f"{optimizer} minus {reference}, paired over the seeds:", ""]
        compared = [("each at its best", best[optimizer], best[reference], measures)]
        for decay in sorted(settings[optimizer]):
            same = of_same_decay(rows, optimizer, decay, reference)
            if same is not None:
                compared.append(("at equal mean decay", decay, same, measures[:-2]))
        for name, one, other, shown in compared:
            pair = ((optimizer, one), (reference, other))
            differences = (f"{m.label} {paired_difference(rows, *pair, m.key)}" for m in shown)
            lines.append(f"- {name} ({one:g}, {other:g}): {', '.join(differences)}")
    grids = {optimizer: {*decays} - {0.0} for optimizer, decays in settings.items() if len({*decays} - {0.0}) > 2}
    if grids:
        lines += [
            "",
            f"Over the weight decays of the grid, the best {metric.label} (of a parabola through the best one and its "
            "neighbours), and the range of its mean (smaller is more robust):",
            "",
        ]
    for optimizer, decays in grids.items():
        found = interpolated_best(rows, optimizer, metric)
        best_at = "the best is at an end" if found is None else f"{found[1]:.4g} at {found[0]:.3g}"
        means = [mean_of(rows, optimizer, decay, metric.key) for decay in decays]
        lines.append(f"- {optimizer}: {best_at}; {max(means) - min(means):.4g} over {len(means)} values")
    return "\n".join(lines) + "\n"


# --- plot ---


def plot_robustness(rows: list[Row], metric: Measure, path: Path) -> None:
    """Metric and gradient norm against the decay that a run really had, so that all optimizers share the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {metric.key: metric.label, "final_grad_norm": f"L2 norm of the gradient, last {NUM_LAST_LOGS} logs"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for index, (optimizer, decays) in enumerate(settings_of(rows).items()):
            colour = COLOURS[index % len(COLOURS)]
            points = {decay: mean_and_error([*column(rows, optimizer, decay, key).values()]) for decay in decays}
            if 0.0 in points:  # has no place on a logarithmic axis
                mean, error = points.pop(0.0)
                axes.axhline(mean, color=colour, linestyle=":", label=f"{optimizer}, no decay")
                axes.axhspan(mean - error, mean + error, color=colour, alpha=0.1, linewidth=0)
            # In the order of the decays that they really had.
            effective = sorted((mean_of(rows, optimizer, decay, "mean_weight_decay"), decay) for decay in points)
            if effective:
                means, errors = zip(*(points[decay] for _, decay in effective), strict=True)
                errors = [0 if math.isnan(error) else error for error in errors]
                style = {"fmt": f"{MARKERS[index % len(MARKERS)]}-", "color": colour, "capsize": 3, "markersize": 4}
                axes.errorbar([decay for decay, _ in effective], means, errors, label=optimizer, **style)
        axes.set_xscale("log")
        axes.set_xlabel("effective weight decay, mean over the training")
        axes.set_ylabel(label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
