"""`hf-swd plot --against weight_decay`: what runs ended at, over the weight decay that they had."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .advise import advise
from .plot import COLOURS, dress, name_of, require_matplotlib, save_figure, styles_of


def plot_against_decay(
    output_dirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    metric: str | None = None,
) -> Path:
    """
    Draws the metric of runs against their weight decay, with the parabola through the best and its neighbours, and the
    weight decay that `hf-swd advise` says to try next. Runs that it leaves out are named on stderr.

    Args:
        output_dirs, metric: see [`~hf_swd.commands.advise.advise`].
        output (path, *optional*, defaults to `swd_plot.png` in the first of `output_dirs`): image file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has an evaluation and a weight decay above 0, and whatever `advise` raises.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    advice = advise(output_dirs, metric)
    settings = [setting for setting in advice.settings if setting.weight_decay > 0]
    if not settings or advice.proposal is None:
        raise ValueError("no run has an evaluation (eval_strategy) and a weight_decay above 0 (training_args.bin)")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for setting in settings:
        axes.plot([setting.weight_decay] * len(setting.values), setting.values, ".", color="0.6")
    decays = [setting.weight_decay for setting in settings]
    name = name_of(settings[0].runs[0].optim)
    solid, dashed = styles_of([name] * 2)
    has_seeds = any(len(setting.values) > 1 for setting in settings)
    label = f"{name}, {'mean over the seeds' if has_seeds else 'one run each'}"
    axes.plot(decays, [setting.mean for setting in settings], **solid, marker="o", label=label)
    proposal, noise = advice.proposal, advice.noise
    best = min(advice.settings, key=lambda setting: setting.loss)
    axes.axhspan(
        best.mean - noise, best.mean + noise, color="0.93", zorder=0, label="as good as the best, within noise"
    )
    for setting in advice.settings:
        if setting.weight_decay == 0:  # has no place on a logarithmic axis
            axes.axhline(setting.mean, color="0.6", linestyle=":", label="no weight decay")
    if proposal.parabola is not None:
        place = decays.index(best.weight_decay)
        left, right = decays[place - 1], decays[place + 1]
        shown = [left * (right / left) ** (i / 100) for i in range(101)]
        sign = -1 if advice.metric.greater_is_better else 1
        heights = [best.mean + sign * proposal.parabola.above_best(decay) for decay in shown]
        axes.plot(shown, heights, **dashed, label="parabola", zorder=1)
    verdict, decay = "next", proposal.weight_decay
    if decay is None:
        verdict, decay = "keep", best.weight_decay
    draw, value = (axes.axvline, decay) if decay else (axes.axhline, best.mean)
    # Wide and below the others, of which one may lie upon it.
    draw(value, color=COLOURS[2], linewidth=4, alpha=0.5, zorder=1, label=f"{verdict}: {decay:g}")
    axes.set_xscale("log")
    ticks = sorted({*decays, decay} - {0.0})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    dress(axes, "weight decay")
    axes.set_ylabel(f"{advice.metric.key}{', best' if advice.metric.at_best else ', at the end'}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    for line in advice.left_out:
        print(line, file=sys.stderr)
    return save_figure(figure, Path(output_dirs[0]), output)
