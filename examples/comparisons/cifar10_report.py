"""What reproduce_cifar10.py makes of its finished runs: results, table, plot."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from cifar10_models import WIDTH
from cifar10_runs import FULL_EPOCHS, OPTIMIZERS, Run

from hf_swd.commands.plot import name_of, styles_of


def result_of(run: Run) -> dict:
    rows = run.rows()
    kept = ("test_error", "train_loss", "train_error", "effective_decay", "weight_norm", "grad_norm")
    return {
        "run": run.name,
        "optimizer": run.optimizer.kind,
        "weight_decay": run.optimizer.weight_decay,
        "lr": run.optimizer.lr,
        "seed": run.seed,
        "epochs": len(rows),
        **{key: rows[-1][key] for key in (*kept, "grad_norm_times_weight_norm")},
        "best_test_error": min(row["test_error"] for row in rows if row["test_error"] is not None),
        "wall_time_s": sum(row["seconds"] for row in rows),
    }


def cell(values: list[float | None]) -> str:
    """Mean ± standard error, as far as there are any."""
    if None in values:
        return "–"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):#.3g}{error}"


def scale_of(arguments: argparse.Namespace, num_train: int) -> str:
    width = f"width {arguments.width}" + ("" if arguments.width == WIDTH else f" instead of {WIDTH}")
    full = arguments.epochs == FULL_EPOCHS
    epochs = f"{FULL_EPOCHS} epochs" if full else f"shortened to {arguments.epochs} epochs (of {FULL_EPOCHS})"
    parts = [arguments.model, width, f"{num_train:,} training images", epochs]
    if arguments.batch_size != 128:
        parts.append(f"batch {arguments.batch_size}")
    if not arguments.augmentation:
        parts.append("no augmentation")
    if arguments.reference_steps:
        parts.append(f"reference_steps={arguments.reference_steps}")
    return ", ".join([*parts, {"no": "float32"}.get(arguments.mixed_precision, arguments.mixed_precision)])


def table(runs: list[Run], results: list[dict], scale: str) -> str:
    arguments = runs[0].arguments
    keys = ("test_error", "grad_norm", "weight_norm", "grad_norm_times_weight_norm", "effective_decay")
    lines = [
        f"CIFAR-10, {scale}; seeds {' '.join(str(seed) for seed in arguments.seeds)}.",
        "",
        "| optimizer | weight decay | test error, % | gradient norm | ‖w‖ | product | effective decay "
        "| test error in the paper, %, full scale |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for optimizer in arguments.optimizers:
        chosen = [result for run, result in zip(runs, results, strict=True) if run.optimizer == optimizer]
        cells = [cell([result[key] for result in chosen]) for key in keys]
        kind, _, default_lr, paper = OPTIMIZERS[optimizer.kind]
        as_paper = optimizer.is_default and not (optimizer.kind == "adams" and arguments.reference_steps)
        name = kind if optimizer.lr == default_lr else f"{kind}, lr {optimizer.lr:g}"
        cells.append(paper.get(arguments.model, "–") if as_paper else "–")
        lines.append(f"| {name} | {optimizer.weight_decay:g} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Values of the last epoch, mean ± standard error over the seeds. The last column is the paper's, for the "
            "full scale: width 64, 50,000 training images, 200 epochs. Gradient norm: of the mean training loss "
            "without weight decay, on a fixed subset without augmentation of at most "
            f"{arguments.grad_norm_images:,} images, in float32. "
            "‖w‖: of all parameters with two or more dimensions. Effective decay: factor of lr · w in the last step; "
            "an L2 term in the gradient has none.",
            "",
        ]
    )


def plot(runs: list[Run], path: Path, scale: str) -> None:
    """Mean over the seeds and, as a band, their range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = {
        "test_error": "test error, %",
        "grad_norm": "gradient norm of the training loss, nats",
        "grad_norm_times_weight_norm": "‖w‖ × gradient norm, nats",
        "effective_decay": "effective weight decay: the weight_decay that acts in a step",
    }
    optimizers = runs[0].arguments.optimizers
    styles = styles_of([name_of(optimizer.kind) for optimizer in optimizers])
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for index, optimizer in enumerate(optimizers):
            histories = [run.rows() for run in runs if run.optimizer == optimizer]
            points = [rows for rows in zip(*histories, strict=True) if rows[0][key] is not None]
            if not points:
                continue
            epochs = [rows[0]["epoch"] for rows in points]
            values = [[row[key] for row in rows] for rows in points]
            # Thinner and thinner, so that a line on another leaves it visible.
            style = {**styles[index], "linewidth": max(2.6 - 0.4 * index, 1)}
            style |= {"marker": "osD^v"[index % 5], "markersize": 3} if len(epochs) <= 15 else {}
            axes.plot(epochs, [*map(statistics.fmean, values)], label=optimizer.label, **style)
            axes.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.15, lw=0)
        axes.set_xlabel("epoch")
        axes.set_title(label, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = [y for line in axes.lines for y in line.get_ydata() if 0 < y < math.inf]
        ratio = max(drawn) / min(drawn) if drawn else 1
        if ratio > 3:  # otherwise a logarithmic axis has hardly a tick, and is no different
            axes.set_yscale("log")
            steps = (1, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 300 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    seeds = " ".join(str(seed) for seed in runs[0].arguments.seeds)
    figure.suptitle(f"CIFAR-10, {scale}\nmean over the seeds {seeds}, and their range", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "optimizer and weight decay"
    figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=3.5, frameon=False, title=title)
    figure.savefig(path, dpi=150)
