"""Prints one table of several runs of the examples, from their all_results.json and trainer_state.json.

python scripts/quickstart_report.py outputs/quickstart/lm-adamw-2 outputs/quickstart/lm-adams-2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from hf_swd.commands.run_log import read_training_log


NUM_LAST_LOGS = 5  # the gradient norm of a single step is mostly noise


def summary(run: Path) -> dict[str, str]:
    """Returns the rows of the table for one run.

    Args:
        run (`Path`): output folder of a run with --do_train and --do_eval.
    """
    results = json.loads((run / "all_results.json").read_text())
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    log = read_training_log(run)
    decays = log.decays or [log.weight_decay or 0.0]
    rows = {"": run.name, "validation accuracy": f"{results['eval_accuracy']:.4f}"}
    if "eval_majority_baseline" in results:
        rows["majority baseline"] = f"{results['eval_majority_baseline']:.4f}"
    rows["validation loss"] = f"{results['eval_loss']:.4f}"
    if len(losses) > 1:
        rows["its lowest"] = f"{min(losses):.4f}"
    return rows | {
        f"gradient norm, mean of the last {NUM_LAST_LOGS} logs": f"{fmean(log.norms[-NUM_LAST_LOGS:]):.4g}",
        "effective weight decay, first log": f"{decays[0]:.4g}",
        "effective weight decay, last log": f"{decays[-1]:.4g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Table of runs of the examples.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders")
    columns = [summary(run) for run in parser.parse_args().runs]
    width = max(map(len, columns[0]))
    for name in columns[0]:
        print(f"{name:{width}}", *(f"{column[name]:>{max(12, len(column['']))}}" for column in columns))


if __name__ == "__main__":
    main()
