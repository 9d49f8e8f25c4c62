"""Compares optimizers of the Trainer over weight decays and seeds, on a task of these examples: verdict, table, plots.

    python examples/comparisons/compare_optimizers.py --task digits --seeds 0 1 2 3 4 \\
        --output_dir outputs/compare-digits
    python examples/comparisons/compare_optimizers.py --task lm --seeds 0 1 2 --jobs 2 \\
        --optimizer adamw 0.1 0.3 1 3 10 --optimizer adams:reference_steps=100 0.1 0.3 1 3 10 \\
        --output_dir outputs/compare-lm -- --max_grad_norm 1

Every run is a process of its own in OUTPUT_DIR/RUN. Called again, it goes on where it was interrupted: finished runs
are not repeated. Tables and plots hold all finished runs in OUTPUT_DIR, so that more seeds of the weight decays that
look best can be asked for in a second call. What follows `--` goes to the script of the task, after the task's own
settings: `-- --train_file my_text.txt` compares on a text of your own.

The best weight decay of each optimizer is chosen by the mean over the seeds of the same validation data that it is
then reported on: equal grids keep that fair, but it is not a test error.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from comparison_report import NUM_LAST_LOGS, Measure, Results, plot_robustness, table, verdict
from safetensors import safe_open
from tqdm import tqdm

from hf_swd.commands.plot import name_of, plot_runs
from hf_swd.commands.run_log import read_run


EXAMPLES = Path(__file__).resolve().parents[1]
SHARED = (
    "--do_train --do_eval --max_grad_norm 0 --save_strategy no --report_to none --disable_tqdm True "
    "--dataloader_pin_memory False"
).split()
# Arguments of the scripts that name data; without one, the data are those that need no download.
SOURCES = {"--dataset_name", "--train_file", "--train_dir", "--task_name"}
SECONDS_BETWEEN_LINES = 30
FEW_RUNS = 6  # that training.png shows all of


@dataclass(frozen=True)
class Task:
    """An example script, its settings, and what its runs are compared by."""

    script: str  # below examples/
    settings: str
    metric: Measure


ACCURACY = Measure("eval_accuracy", "accuracy", larger_is_better=True)
TASKS = {
    "digits": Task(
        "classification/run_image_classification.py",
        "--learning_rate 1e-3 --warmup_steps 100 --lr_scheduler_type cosine --per_device_train_batch_size 32 "
        "--num_train_epochs 40 --logging_steps 20",
        ACCURACY,
    ),
    "text": Task(
        "classification/run_glue.py",
        "--learning_rate 3e-4 --warmup_steps 0.1 --num_train_epochs 1.5 --per_device_train_batch_size 32 "
        "--per_device_eval_batch_size 64 --max_seq_length 48 --train_sampling_strategy group_by_length "
        "--logging_steps 5",
        ACCURACY,
    ),
    # Little text, many times over.
    "lm": Task(
        "language_modeling/run_clm.py",
        "--vocab_size 257 --max_train_characters 50000 --max_eval_samples 1000 --block_size 64 --config_overrides "
        "hidden_size=48,intermediate_size=128,num_hidden_layers=3,num_attention_heads=3 --learning_rate 3e-3 "
        "--warmup_steps 100 --lr_scheduler_type cosine --adam_beta2 0.99 --per_device_train_batch_size 16 "
        "--per_device_eval_batch_size 64 --max_steps 1200 --logging_steps 20 --eval_strategy steps --eval_steps 100",
        Measure("eval_loss", "validation loss", larger_is_better=False),
    ),
}
ALIASES = {"adamw": "adamw_torch_fused", "decay": "adamw_torch_fused"}
RECORD = "run.json"


@dataclass(frozen=True)
class Run:
    optimizer: str  # NAME or NAME:OPTIM_ARGS
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        optimizer = self.optimizer.replace(":", "-").replace(",", "-")
        return f"{optimizer}-{self.weight_decay:g}-seed{self.seed}"

    @property
    def title(self) -> str:
        name, _, optim_args = self.optimizer.partition(":")
        return f"{name_of(name)} {self.weight_decay:g}{optim_args and f' ({optim_args})'}, seed {self.seed}"


def command_of(run: Run, task: Task, script_arguments: list[str]) -> list[str]:
    name, _, optim_args = run.optimizer.partition(":")
    return [
        *(["comparisons/other_decays.py"] if name == "decay" else []),
        task.script,
        *SHARED,
        *([] if SOURCES.intersection(argument.partition("=")[0] for argument in script_arguments) else ["--embedded"]),
        *task.settings.split(),
        *("--optim", ALIASES.get(name, name), *(("--optim_args", optim_args) if optim_args else ())),
        *("--weight_decay", str(run.weight_decay), "--seed", str(run.seed)),
        *script_arguments,
    ]


def finished(folder: Path, command: list[str]) -> bool:
    """Whether the run is complete; with other settings it is an error, so that no table mixes two experiments."""
    record = folder / RECORD
    if not record.exists():
        return False
    if json.loads(record.read_text())["command"] != command:
        raise ValueError(
            f"output_dir={str(folder.parent)!r} holds the run {folder.name} with other settings; "
            "choose another --output_dir, or delete it"
        )
    results = folder / "all_results.json"
    return results.exists() and "eval_loss" in json.loads(results.read_text())


def recorded(output_dir: Path) -> list[Run]:
    """All runs that were begun there, by optimizer, weight decay and seed."""
    records = (json.loads(path.read_text()) for path in output_dir.glob(f"*/{RECORD}"))
    runs = [Run(*(record[key] for key in ("optimizer", "weight_decay", "seed"))) for record in records]
    return sorted(runs, key=lambda run: (run.optimizer, run.weight_decay, run.seed))


def execute(run: Run, folder: Path, command: list[str], environment: dict[str, str], metric: Measure) -> None:
    if finished(folder, command):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({**asdict(run), "command": command}))
    script, *options = command
    line = [sys.executable, str(EXAMPLES / script), *options, "--output_dir", str(folder), "--overwrite_output_dir"]
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log, Progress(run.title, options) as progress:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(line, env={**environment, "PYTHONUNBUFFERED": "1"}, **pipe) as process:
            for text in process.stdout:
                log.write(text)
                progress.read(text)
    if process.returncode:
        end = "".join((folder / "log.txt").read_text().splitlines(keepends=True)[-20:])
        raise RunError(f"{end}{folder.name} ended with status {process.returncode}: {folder / 'log.txt'}, end above")
    result = json.loads((folder / "all_results.json").read_text())[metric.key]
    tqdm.write(f"{run.title}: {metric.label} {result:#.3g} after {time.monotonic() - start:.0f} s", file=sys.stderr)


class RunError(RuntimeError):
    """Of the script of a task; its message ends with where the whole output is."""


class Progress:
    """Of a run, by what its Trainer prints at every log: a bar, or lines where stderr is a file."""

    def __init__(self, title: str, options: list[str]) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--max_steps", type=int, default=-1)
        parser.add_argument("--logging_steps", type=float, default=500)
        parser.add_argument("--num_train_epochs", type=float, default=3)
        given, _ = parser.parse_known_args(options)
        self._epochs = given.num_train_epochs if given.max_steps < 0 else None
        self._per_log = given.logging_steps / given.max_steps
        self._title, self._done, self._last_line = title, 0.0, time.monotonic()
        shown = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=1.0, desc=title, bar_format=shown, leave=False, mininterval=1, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def read(self, line: str) -> None:
        if not line.startswith("{'loss'"):
            return
        logged = ast.literal_eval(line)
        done = self._done + self._per_log if self._epochs is None else float(logged["epoch"]) / self._epochs
        self._done, loss = min(done, 1.0), f"loss {float(logged['loss']):#.3g}"
        if not self._bar.disable:
            self._bar.set_postfix_str(loss, refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._title}: {100 * self._done:.0f} %, {loss}", file=sys.stderr, flush=True)


def result_of(run: Run, folder: Path, metric: Measure) -> dict[str, Any]:
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "grad_norm" in entry]
    evaluations = [entry[metric.key] for entry in history if metric.key in entry] or [results[metric.key]]
    mean_decay = read_run(folder).mean_decay
    return {
        "optimizer": run.optimizer,
        "weight_decay": run.weight_decay,
        "seed": run.seed,
        metric.key: results[metric.key],
        f"best_{metric.key}": max(evaluations) if metric.larger_is_better else min(evaluations),
        "eval_loss": results["eval_loss"],
        "train_loss": results["train_loss"],
        "final_train_loss": statistics.fmean(entry["loss"] for entry in logs[-NUM_LAST_LOGS:]),
        "final_grad_norm": statistics.fmean(entry["grad_norm"] for entry in logs[-NUM_LAST_LOGS:]),
        "weight_norm": weight_norm(folder),
        "mean_weight_decay": run.weight_decay if mean_decay is None else mean_decay,
        "final_weight_decay": logs[-1].get("swd/weight_decay", run.weight_decay),
        "train_runtime": results["train_runtime"],
    }


def weight_norm(folder: Path) -> float:
    """2-norm of all saved weights (of adapters if they alone are saved) with two or more dimensions: those that have
    weight decay."""
    square = 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118 - it is no mapping
            square += sum(w.double().square().sum().item() for w in weights if w.dim() > 1)
    return math.sqrt(square)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--optimizer",
        dest="optimizers",
        action="append",
        nargs="+",
        metavar=("NAME[:OPTIM_ARGS]", "WEIGHT_DECAY"),
        help="a name of --optim (adamw: torch's fused AdamW), perhaps with its --optim_args, and the weight decays "
        "that it is tried with; repeat it for each optimizer. The first is what the others are compared with. By "
        "default adamw 0 0.05 0.5 5, and adams 0.0005 0.005 0.05 0.5",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("script_arguments", nargs="*", help="after --: further arguments of the task's script")
    arguments = parser.parse_args()
    grids: dict[str, list[float]] = {}
    for name, *decays in arguments.optimizers or (
        ["adamw", "0", "0.05", "0.5", "5"],
        ["adams", "0.0005", "0.005", "0.05", "0.5"],
    ):
        try:
            grids.setdefault(name, []).extend(map(float, decays))
            if not decays or not all(0 <= decay < math.inf for decay in grids[name]):
                raise ValueError
        except ValueError:
            parser.error(
                f"--optimizer {name} {' '.join(decays)}: expected a name and weight decays of at least 0, such as "
                "`--optimizer adams:reference_steps=100 0.01 0.1 1`"
            )
    arguments.optimizers = grids
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: expected at least 1")
    return arguments


def execute_all(commands: dict[Run, list[str]], output_dir: Path, jobs: int, metric: Measure) -> None:
    """`jobs` at a time; the first that fails stops those that have not begun."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if jobs > 1 else dict(os.environ)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(execute, run, output_dir / run.name, command, environment, metric)
            for run, command in commands.items()
        ]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    arguments = parse_arguments()
    task: Task = TASKS[arguments.task]
    output_dir: Path = arguments.output_dir

    def command(run: Run) -> list[str]:
        return command_of(run, task, arguments.script_arguments)

    # Seed by seed, so that an interrupted comparison has whole rows of the grid.
    asked = [
        Run(optimizer, decay, seed)
        for seed in dict.fromkeys(arguments.seeds)
        for optimizer, decays in arguments.optimizers.items()
        for decay in dict.fromkeys(decays)
    ]
    try:
        execute_all({run: command(run) for run in asked}, output_dir, arguments.jobs, task.metric)
    except RunError as error:
        sys.exit(str(error))
    order = [*arguments.optimizers]
    runs = [run for run in recorded(output_dir) if finished(output_dir / run.name, command(run))]
    runs.sort(key=lambda run: order.index(run.optimizer) if run.optimizer in order else len(order))
    frame = pd.DataFrame(result_of(run, output_dir / run.name, task.metric) for run in runs)
    frame.to_csv(output_dir / "results.csv", index=False)
    results = Results(frame, task.metric)
    (output_dir / "results.md").write_text(table(results))
    shown = runs
    if len(runs) > FEW_RUNS:  # the first seed of each optimizer at its best
        best = [(optimizer, results.best(optimizer)) for optimizer in results.grids]
        shown = [min((r for r in runs if (r.optimizer, r.weight_decay) == one), key=lambda r: r.seed) for one in best]
    plot_runs([output_dir / run.name for run in shown], output_dir / "training.png")
    drawn = ["robustness.png"] if plot_robustness(results, output_dir / "robustness.png") else []
    print(f"{output_dir}: all numbers in results.md, curves in {', '.join(['training.png', *drawn])}")
    for sentence in verdict(results):
        print(sentence)
    print(f"Which weight decay to try next is said by: hf-swd advise {output_dir}")


if __name__ == "__main__":
    main()
