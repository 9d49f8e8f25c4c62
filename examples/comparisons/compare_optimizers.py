"""Compares AdamS with AdamW over weight decays and seeds, on a task of these examples: CSV, table, plots.

    python examples/comparisons/compare_optimizers.py --task digits --seeds 0 1 2 3 4 \\
        --output_dir outputs/compare-digits
    python examples/comparisons/compare_optimizers.py --task text --seeds 0 1 2 \\
        --adamw_weight_decay 0.01 1 5 --adams_weight_decay 0.01 1 5 --adams_args reference_steps=18 \\
        --output_dir outputs/compare-text -- --num_train_epochs 3

Every run is a process of its own in OUTPUT_DIR/RUN. Called again, it goes on where it was interrupted: finished runs
are read, not repeated. What follows `--` goes to the script of the task, after the task's own settings. Weight decay 0
of AdamW is Adam.

The best weight decay of each optimizer is chosen by the mean over the seeds of the same validation data that it is
then reported on: equal grids keep that fair, but it is not a test error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tables import mean_and_error, write_csv
from tqdm import tqdm

from hf_swd.commands.plot import COLOURS, plot_runs


SCRIPTS = Path(__file__).resolve().parents[1] / "classification"
SHARED = (
    "--embedded --do_train --do_eval --max_grad_norm 0 --save_strategy no --report_to none --disable_tqdm True "
    "--dataloader_pin_memory False"
).split()
TASKS = {
    "digits": (
        "run_image_classification.py",
        "--learning_rate 1e-3 --warmup_steps 100 --lr_scheduler_type cosine --per_device_train_batch_size 32 "
        "--num_train_epochs 40 --logging_steps 20".split(),
    ),
    "text": (
        "run_glue.py",
        "--learning_rate 3e-4 --warmup_steps 0.1 --num_train_epochs 1.5 --per_device_train_batch_size 32 "
        "--per_device_eval_batch_size 64 --max_seq_length 48 --train_sampling_strategy group_by_length "
        "--logging_steps 5".split(),
    ),
}
NUM_LAST_LOGS = 5  # the gradient norm of a single step is mostly noise
METRIC = "eval_accuracy"
STYLES = (("adams", "AdamS", "o-", COLOURS[0]), ("adamw", "AdamW", "s--", COLOURS[1]))


@dataclass(frozen=True)
class Run:
    optimizer: str  # "adams" or "adamw"
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.weight_decay:g}-seed{self.seed}"


def command_of(run: Run, arguments: argparse.Namespace) -> list[str]:
    script, settings = TASKS[arguments.task]
    optimizer = ["--optim", "adamw_torch_fused"]
    if run.optimizer == "adams":
        optimizer = ["--optim", "adams", *(["--optim_args", arguments.adams_args] if arguments.adams_args else [])]
    return [
        script,
        *SHARED,
        *settings,
        *optimizer,
        *("--weight_decay", str(run.weight_decay), "--seed", str(run.seed)),
        *arguments.script_arguments,
    ]


def finished(folder: Path, command: list[str]) -> bool:
    """Whether the run is complete; with other settings it is an error, so that no table mixes two experiments."""
    record = folder / "command.json"
    if not record.exists():
        return False
    if json.loads(record.read_text()) != command:
        raise ValueError(
            f"output_dir={str(folder.parent)!r} holds the run {folder.name} with other settings; "
            "choose another --output_dir, or delete it"
        )
    results = folder / "all_results.json"
    return results.exists() and METRIC in json.loads(results.read_text())


def execute(run: Run, arguments: argparse.Namespace) -> None:
    folder, command = arguments.output_dir / run.name, command_of(run, arguments)
    if finished(folder, command):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.json").write_text(json.dumps(command))
    with (folder / "log.txt").open("w") as log:
        code = subprocess.call(
            [
                sys.executable,
                str(SCRIPTS / command[0]),
                *command[1:],
                "--output_dir",
                str(folder),
                "--overwrite_output_dir",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if code:
        raise RuntimeError(f"{run.name} ended with status {code}; its output is in {folder / 'log.txt'}")


def result_of(run: Run, folder: Path) -> dict:
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    decays = [entry["swd/weight_decay"] for entry in history if "swd/weight_decay" in entry] or [run.weight_decay]
    return {
        "optimizer": run.optimizer,
        "weight_decay": run.weight_decay,
        "seed": run.seed,
        METRIC: results[METRIC],
        "eval_loss": results["eval_loss"],
        "train_loss": results["train_loss"],
        "final_grad_norm": statistics.fmean(norms[-NUM_LAST_LOGS:]),
        "mean_weight_decay": statistics.fmean(decays),
        "final_weight_decay": decays[-1],
        "train_runtime": results["train_runtime"],
    }


def best_decays(rows: list[dict]) -> dict[str, float]:
    """Of each optimizer the weight decay with the best mean metric; ties go to the smaller."""
    means: dict[str, dict[float, float]] = defaultdict(dict)
    for optimizer, decay in dict.fromkeys((row["optimizer"], row["weight_decay"]) for row in rows):
        means[optimizer][decay] = statistics.fmean(column(rows, optimizer, decay, METRIC))
    return {optimizer: max(sorted(found), key=found.get) for optimizer, found in means.items()}


def column(rows: list[dict], optimizer: str, decay: float, key: str) -> list[float]:
    """Values over the seeds, in their order."""
    chosen = [row for row in rows if (row["optimizer"], row["weight_decay"]) == (optimizer, decay)]
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]


def table(rows: list[dict]) -> str:
    best = best_decays(rows)
    keys = {
        METRIC: "accuracy",
        "eval_loss": "loss",
        "final_grad_norm": "gradient norm",
        "mean_weight_decay": "mean decay",
        "final_weight_decay": "final decay",
    }
    lines = [
        f"| optimizer | weight decay | seeds | {' | '.join(keys.values())} |",
        "|---|---:|---:|" + "---:|" * len(keys),
    ]
    for optimizer, decay in dict.fromkeys((row["optimizer"], row["weight_decay"]) for row in rows):
        cells = []
        for key in keys:
            mean, error = mean_and_error(column(rows, optimizer, decay, key))
            cells.append(f"{mean:.4g} ± {error:.2g}")
        seeds = len(column(rows, optimizer, decay, METRIC))
        mark = " (best)" if best[optimizer] == decay else ""
        name = "adam" if optimizer == "adamw" and decay == 0 else optimizer
        lines.append(f"| {name} | {decay:g}{mark} | {seeds} | {' | '.join(cells)} |")
    lines += [
        "",
        "± is the standard error over the seeds. Gradient norm: before clipping, mean of the last "
        f"{NUM_LAST_LOGS} logs. Mean and final decay: the effective one, over the logs of a run and in the last.",
    ]
    if {"adams", "adamw"} <= best.keys():
        lines += ["", "Paired differences over the seeds, AdamS minus AdamW, each at its best weight decay:", ""]
        for key, name in keys.items():
            pairs = zip(*(column(rows, o, best[o], key) for o in ("adams", "adamw")), strict=True)
            mean, error = mean_and_error([a - b for a, b in pairs])
            lines.append(f"- {name}: {mean:+.4g} ± {error:.2g}")
        lines += [
            "",
            "Robustness: range of the mean accuracy over the grid of weight decays (smaller is more robust):",
            "",
        ]
        for optimizer in best:
            decays = sorted({row["weight_decay"] for row in rows if row["optimizer"] == optimizer} - {0.0})
            means = [statistics.fmean(column(rows, optimizer, decay, METRIC)) for decay in decays]
            lines.append(f"- {optimizer}: {max(means) - min(means):.4g} over {len(decays)} values")
    return "\n".join(lines) + "\n"


def plot_robustness(rows: list[dict], path: Path) -> None:
    """Metric and gradient norm against the decay that a run really had, so that both optimizers share the axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = {METRIC: "validation accuracy", "final_grad_norm": f"L2 norm of the gradient, last {NUM_LAST_LOGS} logs"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for optimizer, name, style, colour in STYLES:
            decays = sorted({row["weight_decay"] for row in rows if row["optimizer"] == optimizer})
            points = {decay: mean_and_error(column(rows, optimizer, decay, key)) for decay in decays}
            if 0.0 in points:  # has no place on a logarithmic axis
                mean, error = points.pop(0.0)
                axis.axhline(mean, color="#000000", linestyle=":", label="no decay (Adam)")
                axis.axhspan(mean - error, mean + error, color="#000000", alpha=0.1, linewidth=0)
            if points:
                effective = [statistics.fmean(column(rows, optimizer, decay, "mean_weight_decay")) for decay in points]
                means, errors = zip(
                    *((mean, 0 if math.isnan(error) else error) for mean, error in points.values()), strict=True
                )
                axis.errorbar(effective, means, errors, fmt=style, color=colour, capsize=3, label=name)
        axis.set_xscale("log")
        axis.set_xlabel("effective weight decay, mean over the training")
        axis.set_ylabel(label)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adamw_weight_decay", type=float, nargs="*", default=[0.0, 0.05, 0.5, 5.0], help="0 is Adam")
    parser.add_argument("--adams_weight_decay", type=float, nargs="*", default=[0.0005, 0.005, 0.05, 0.5])
    parser.add_argument("--adams_args", default="", help="--optim_args of AdamS, such as reference_steps=100")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("script_arguments", nargs="*", help="after --: further arguments of the task's script")
    arguments = parser.parse_args()
    for name in ("adamw_weight_decay", "adams_weight_decay"):
        if any(decay < 0 for decay in getattr(arguments, name)):
            parser.error(f"--{name} {getattr(arguments, name)}: expected numbers of at least 0")
    if not arguments.adamw_weight_decay and not arguments.adams_weight_decay:
        parser.error("--adamw_weight_decay and --adams_weight_decay are both empty: nothing to run")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Seed by seed, so that an interrupted comparison has whole rows of the grid.
    runs = [
        Run(optimizer, decay, seed)
        for seed in dict.fromkeys(arguments.seeds)
        for optimizer, decays in (("adams", arguments.adams_weight_decay), ("adamw", arguments.adamw_weight_decay))
        for decay in dict.fromkeys(decays)
    ]
    progress = tqdm(runs, unit="run")
    for run in progress:
        progress.set_postfix_str(run.name)
        execute(run, arguments)
    rows = [result_of(run, arguments.output_dir / run.name) for run in runs]
    write_csv(rows, arguments.output_dir / "results.csv")
    text = table(rows)
    (arguments.output_dir / "results.md").write_text(text)
    plot_robustness(rows, arguments.output_dir / "robustness.png")
    best = best_decays(rows)
    folders = [str(arguments.output_dir / Run(o, decay, arguments.seeds[0]).name) for o, decay in best.items()]
    plot_runs(folders, arguments.output_dir / "training.png")
    print(text)
    print(
        f"{arguments.output_dir}: results.csv, results.md, robustness.png, "
        "training.png (the first seed at the best decays)"
    )


if __name__ == "__main__":
    main()
