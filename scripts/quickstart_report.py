"""Prints one table of several runs of run_glue.py, from their all_results.json and trainer_state.json.

python scripts/quickstart_report.py outputs/quickstart/adams outputs/quickstart/adamw --weight_decay 0.01
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean


NUM_LAST_LOGS = 5  # the gradient norm of a single step is mostly noise


def summary(run: Path, weight_decay: float) -> dict[str, str]:
    """Returns the rows of the table for one run.

    Args:
        run (`Path`): output folder of a run with --do_train and --do_eval.
        weight_decay (`float`): the constant decay of a run that logged no effective one.
    """
    results = json.loads((run / "all_results.json").read_text())
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    decays = [entry["swd/weight_decay"] for entry in history if "swd/weight_decay" in entry] or [weight_decay]
    return {
        "": run.name,
        "validation accuracy": f"{results['eval_accuracy']:.4f}",
        "majority baseline": f"{results['eval_majority_baseline']:.4f}",
        "validation loss": f"{results['eval_loss']:.4f}",
        f"gradient norm, mean of the last {NUM_LAST_LOGS} logs": f"{fmean(norms[-NUM_LAST_LOGS:]):.4g}",
        "effective weight decay, first log": f"{decays[0]:.4g}",
        "effective weight decay, last log": f"{decays[-1]:.4g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Table of runs of examples/classification/run_glue.py.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders")
    parser.add_argument(
        "--weight_decay", type=float, required=True, help="decay of a run that logged no effective one"
    )
    args = parser.parse_args()
    columns = [summary(run, args.weight_decay) for run in args.runs]
    width = max(map(len, columns[0]))
    for name in columns[0]:
        print(f"{name:{width}}", *(f"{column[name]:>12}" for column in columns))


if __name__ == "__main__":
    main()
