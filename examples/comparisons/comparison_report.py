"""What compare_optimizers.py makes of its finished runs: table, paired differences, plot, verdict."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hf_swd.commands.forecast import CONSTANTS
from hf_swd.commands.plot import name_of, styles_of


MARKERS = "os^Dv<>"
NUM_LAST_LOGS = 5  # the gradient norm of a single step is mostly noise
# Effective decays no further apart are called equal.
SAME_DECAY = 0.05
# A run whose last value is so much worse than its best, relative to that, has overfitted.
OVERFITTED = 0.03
# How many times larger the one of two differences must be to be called the one that decides.
DECIDES = 3
FEW_SETTINGS = 4  # that a verdict names all of

Setting = tuple[str, float]  # optimizer and weight decay


@dataclass(frozen=True)
class Measure:
    """A column of the results."""

    key: str
    label: str
    larger_is_better: bool = False

    @property
    def direction(self) -> str:
        return "higher is better" if self.larger_is_better else "lower is better"


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


class Results:
    """
    The finished runs.

    Args:
        runs (`DataFrame`): a row for each, with `optimizer`, `weight_decay`, `seed` and the keys of `measures_of`;
            the optimizers in the order in which they are shown, the first is what the others are compared with.
        metric ([`Measure`]): what the runs are compared by.
    """

    def __init__(self, runs: pd.DataFrame, metric: Measure) -> None:
        self.metric = metric
        self.runs = runs.set_index(["optimizer", "weight_decay", "seed"])
        settings = self.runs.groupby(level=["optimizer", "weight_decay"], sort=False)
        # Means and standard errors over the seeds; of what has a NaN they are NaN.
        self.means = settings.agg(lambda values: values.mean(skipna=False))
        self.errors = settings.agg(lambda values: values.sem(skipna=False))
        self.num_seeds = settings.size()
        self.grids: dict[str, list[float]] = {
            optimizer: sorted(decays)
            for optimizer, decays in runs.groupby("optimizer", sort=False)["weight_decay"].unique().items()
        }

    def best(self, optimizer: str) -> float:
        """The weight decay with the best mean of the metric; ties go to the smaller, and NaN is never the best."""
        means = self.means.loc[optimizer, self.metric.key].sort_index() * (1 if self.metric.larger_is_better else -1)
        return float(means.fillna(-math.inf).idxmax())

    def is_chosen(self, optimizer: str) -> bool:
        """Whether `best` is a choice among several weight decays with several seeds each."""
        return len(self.grids[optimizer]) > 1 and self.num_seeds[optimizer, self.best(optimizer)] > 1

    def difference(self, one: Setting, other: Setting) -> tuple[pd.Series, pd.Series] | None:
        """`one` minus `other`, paired over the seeds that both have: means and standard errors; `None` without any."""
        ours, theirs = (self.runs.xs(setting, level=("optimizer", "weight_decay")) for setting in (one, other))
        paired = ours.sub(theirs).loc[ours.index.intersection(theirs.index)]
        return (paired.mean(skipna=False), paired.sem(skipna=False)) if len(paired) else None

    def of_same_decay(self, optimizer: str, decay: float, reference: str) -> float | None:
        """The weight decay of `reference` whose effective mean is nearest to that of this setting, if it is equal."""
        mean = self.means.loc[(optimizer, decay), "mean_weight_decay"]
        distances = (self.means.loc[reference, "mean_weight_decay"] - mean).abs()
        return float(distances.idxmin()) if distances.min() <= SAME_DECAY * mean else None

    def interpolated_best(self, optimizer: str) -> tuple[float, float] | None:
        """Weight decay and metric at the vertex of the parabola, over the logarithm of the decay, through the best
        decay of the grid and its neighbours; `None` where the best is at an end of the grid."""
        decays = [decay for decay in self.grids[optimizer] if decay > 0]
        best = self.best(optimizer)
        place = decays.index(best) if best in decays else 0
        if not 0 < place < len(decays) - 1:
            return None
        near = decays[place - 1 : place + 2]
        values = self.means.loc[optimizer, self.metric.key][near].to_numpy()
        if not np.isfinite(values).all():
            return None
        parabola = np.polynomial.Polynomial(np.polynomial.polynomial.polyfit(np.log(near), values, 2))
        (vertex,) = parabola.deriv().roots()
        return math.exp(vertex), float(parabola(vertex))


def plus_minus(error: float) -> str:
    """Of a single seed there is none."""
    return "" if math.isnan(error) else f" ± {error:.2g}"


# --- table ---


def table(results: Results) -> str:
    measures = measures_of(results.metric)
    lines = [
        f"| optimizer | weight decay | seeds | {' | '.join(measure.label for measure in measures)} |",
        "|---|---:|---:|" + "---:|" * len(measures),
    ]
    for optimizer, decays in results.grids.items():
        for decay in decays:
            mean, error = results.means.loc[(optimizer, decay)], results.errors.loc[(optimizer, decay)]
            cells = [f"{mean[m.key]:.4g}{plus_minus(error[m.key])}" for m in measures]
            name = "adam" if optimizer == "adamw" and decay == 0 else optimizer
            mark = " (best)" if results.is_chosen(optimizer) and results.best(optimizer) == decay else ""
            seeds = results.num_seeds[optimizer, decay]
            lines.append(f"| {name} | {decay:g}{mark} | {seeds} | {' | '.join(cells)} |")
    lines += [
        "",
        "± is the standard error over the seeds. Training loss and gradient norm (before clipping): mean of the last "
        f"{NUM_LAST_LOGS} logs. Weight norm: of all weights with two or more dimensions. Mean and final decay: the "
        "effective one, over the logs of a run weighted by the learning rate, and in the last.",
    ]
    return "\n".join([*lines, *differences(results), *grids(results)]) + "\n"


def differences(results: Results) -> list[str]:
    measures = measures_of(results.metric)
    reference, *others = results.grids
    lines = []
    for optimizer in others:
        lines += ["", f"{optimizer} minus {reference}, paired over the seeds:", ""]
        best, of_reference = results.best(optimizer), results.best(reference)
        chosen = results.is_chosen(optimizer) and results.is_chosen(reference)
        compared = [("each at its best", best, of_reference, measures)] if chosen else []
        for decay in results.grids[optimizer]:
            if not chosen and decay in results.grids[reference]:
                compared.append(("at equal weight_decay", decay, decay, measures))
            same = results.of_same_decay(optimizer, decay, reference)
            if same is not None and ("at equal weight_decay", decay, same, measures) not in compared:
                compared.append(("at equal mean decay", decay, same, measures[:-2]))
        for name, one, other, shown in compared:
            found = results.difference((optimizer, one), (reference, other))
            text = "no seed in common"  # a second call may have asked for others
            if found is not None:
                text = ", ".join(f"{m.label} {found[0][m.key]:+.3g}{plus_minus(found[1][m.key])}" for m in shown)
            lines.append(f"- {name} ({one:g}, {other:g}): {text}")
    return lines


def grids(results: Results) -> list[str]:
    lines = []
    for optimizer, decays in results.grids.items():
        decays = [decay for decay in decays if decay > 0]
        if len(decays) > 2:
            found = results.interpolated_best(optimizer)
            best_at = "the best is at an end" if found is None else f"{found[1]:.4g} at {found[0]:.3g}"
            means = results.means.loc[optimizer, results.metric.key][decays]
            lines.append(f"- {optimizer}: {best_at}; {means.max() - means.min():.4g} over {len(decays)} values")
    head = (
        f"Over the weight decays of the grid, the best {results.metric.label} (of a parabola through the best one and "
        "its neighbours), and the range of its mean (smaller is more robust):"
    )
    return ["", head, "", *lines] if lines else []


# --- verdict ---


def verdict(results: Results) -> list[str]:
    """What came out, for someone who has not seen the table: three sentences at most."""
    if len(results.means) < 2:
        return []
    metric, (reference, *others) = results.metric, results.grids
    best = {optimizer: results.best(optimizer) for optimizer in results.grids}
    few = len(results.means) <= FEW_SETTINGS
    named = [(o, decay) for o, decays in results.grids.items() for decay in (decays if few else [best[o]])]
    lines = [
        f"{metric.label.capitalize()} at the end ({metric.direction}"
        + ("" if few else ", each optimizer with its best weight decay")
        + "): "
        + ", ".join(f"{_name(*one)}: {_value(results, one)}" for one in named)
        + "."
    ]
    if not others:
        return lines

    means = results.means[metric.key]

    def ahead(optimizer: str) -> float:
        """By how much it is better than the reference, each with its best weight decay."""
        difference = means[optimizer, best[optimizer]] - means[reference, best[reference]]
        return difference if metric.larger_is_better else -difference

    other = max(others, key=lambda optimizer: abs(ahead(optimizer)))
    strength, schedule = means[reference].max() - means[reference].min(), abs(ahead(other))
    if math.isnan(schedule):
        return lines
    one, two = (other, best[other]), (reference, best[reference])
    found = results.difference(one, two)
    error = math.nan if found is None else found[1][metric.key]
    if math.isnan(error):
        noise = CONSTANTS.noise * abs(means[reference].mean())
        source = f"One seed each: differences below {noise:.2g} ({100 * CONSTANTS.noise:g} %) may be chance."
    else:
        noise = 2 * error
        source = f"Two standard errors over the seeds are {noise:.2g}."

    ended = f"{schedule:.2g} {'better' if ahead(other) > 0 else 'worse'} than" if schedule > noise else "as well as"
    norms = results.means["final_grad_norm"]
    ratio = norms[one] / norms[two] - 1  # says nothing of the optimizers where their weight decays differ
    norm = f", with a gradient norm {100 * abs(ratio):.0f} % {'higher' if ratio > 0 else 'lower'}"
    lines.append(f"{_name(*one)} ended {ended} {_name(*two)}{norm if one[1] == two[1] else ''}.")

    what = "its schedule" if all(name.startswith("adams") for name in others) else "the optimizer"
    over = "" if few else f" over the weight decays of {name_of(reference.partition(':')[0])}"
    of_strength, of_other = f"(a difference of {strength:.2g}{over})", f"({schedule:.2g})"
    if len(results.grids[reference]) < 2:
        return [*lines, source]
    if max(strength, schedule) <= noise:
        decides = f"Neither the strength of the decay {of_strength} nor {what} {of_other} stands out from chance here."
    elif strength >= DECIDES * schedule:
        decides = f"The strength of the decay decides here {of_strength}, not {what} {of_other}."
    elif schedule >= DECIDES * strength:
        decides = f"Not the strength of the decay decides here {of_strength}, but {what} {of_other}."
    else:
        decides = f"The strength of the decay {of_strength} and {what} {of_other} weigh alike here."
    return [*lines, f"{decides} {source}"]


def _name(optimizer: str, decay: float) -> str:
    name, _, options = optimizer.partition(":")
    return f"{name_of(name)} {decay:g}"


def _value(results: Results, setting: Setting) -> str:
    last, best = (results.means.loc[setting, key] for key in (results.metric.key, f"best_{results.metric.key}"))
    overfitted = abs(last - best) > OVERFITTED * abs(best)
    return f"{last:#.3g}" + (f" (it overfits: {best:#.3g} at its best)" if overfitted else "")


# --- plot ---


def label_of(optimizer: str) -> str:
    name, *optim_args = optimizer.split(":", 1)
    return ": ".join([name_of(name), *(options.replace(",", ", ") for options in optim_args)])


def plot_robustness(results: Results, path: Path) -> bool:
    """
    Metric and gradient norm against the decay that a run really had, so that all optimizers share the axis.

    Returns:
        `bool`: whether there was a curve to draw: an optimizer with three weight decays above 0.
    """
    if not any(sum(decay > 0 for decay in decays) > 2 for decays in results.grids.values()):
        return False
    from matplotlib.figure import Figure

    styles = styles_of([name_of(optimizer.partition(":")[0]) for optimizer in results.grids])
    figure = Figure(figsize=(9, 4), layout="constrained")
    labels = {results.metric.key: results.metric.label, "final_grad_norm": f"gradient norm, last {NUM_LAST_LOGS} logs"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for index, (optimizer, decays) in enumerate(results.grids.items()):
            colour, line = styles[index]["color"], styles[index]["linestyle"]
            mean, error = results.means.loc[optimizer, key], results.errors.loc[optimizer, key].fillna(0)
            if 0.0 in decays:  # has no place on a logarithmic axis
                axes.axhline(mean[0.0], color=colour, linestyle=":", label=f"{label_of(optimizer)}, no decay")
                axes.axhspan(mean[0.0] - error[0.0], mean[0.0] + error[0.0], color=colour, alpha=0.1, linewidth=0)
            # In the order of the decays that they really had.
            effective = results.means.loc[optimizer, "mean_weight_decay"].drop(0.0, errors="ignore").sort_values()
            if len(effective):
                style = {"fmt": f"{MARKERS[index % len(MARKERS)]}{line}", "color": colour, "capsize": 3}
                points = mean[effective.index], error[effective.index]
                axes.errorbar(effective, *points, label=label_of(optimizer), markersize=4, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("effective weight decay, mean over the training")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    names = [textwrap.fill(name, 34) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    return True
