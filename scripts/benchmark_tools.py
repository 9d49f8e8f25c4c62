"""What the benchmarks of the optimizer share: timing in turn, rows of results, and the machine's name."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.utils.benchmark import timer  # waits for the accelerator

import hf_swd


LR, DECAY, MAX_NORM = 1e-5, 1e-6, 1.0


# One colour for an optimizer in all pictures; that of another package is grey.
ADAMW_COLOUR, ADAMS_COLOUR, OTHER_COLOUR = "#D55E00", "#0072B2", "#999999"


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = timer()
    function()
    return 1e3 * (timer() - start)


def quartiles(times: list[float]) -> tuple[float, float, float]:
    first, _, third = statistics.quantiles(times, n=4)
    return statistics.median(times), first, third


def time_in_turn(
    functions: dict[str, Callable[[], object]],
    repetitions: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each function, once in every repetition; two warm up. `before` runs before each, not timed."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 2):
        for name, function in functions.items():
            before()
            elapsed = timed(function)
            if repetition >= 2:
                times[name].append(elapsed)
    return times


def rows_of(times: dict[str, list[float]], baseline: str, **common: object) -> list[dict]:
    """One row of each function; without a ratio where `baseline` was not timed."""
    rows = []
    for name, values in times.items():
        median, first, third = quartiles(values)
        row = {
            **common,
            "contender": name,
            "median_ms": median,
            "first_quartile_ms": first,
            "third_quartile_ms": third,
            "repetitions": len(values),
        }
        if baseline in times:
            row["ratio_to_fused_adamw"] = statistics.median(
                a / b for a, b in zip(values, times[baseline], strict=True)
            )
        rows.append(row)
    return rows


def share_moments(optimizers: list[torch.optim.Optimizer], params: list[Parameter]) -> None:
    """One pair of moments for all, where each with its own would not fit; the weights then mean nothing."""
    first, *others = optimizers
    first.step()
    for p in params:
        for other in others:
            other.state[p].update({**first.state[p], "step": first.state[p]["step"].clone()})


def machine(device: torch.device) -> list[str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
        threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
        name = f"{models[0] if models else platform.processor()}, {threads}"
    return [
        f"- device: {name}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, hf_swd {hf_swd.__version__}",
        f"- command: `python {' '.join([f'scripts/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`",
        f"- date: {datetime.date.today().isoformat()}",
    ]


def write_report(path: Path, lines: list[str], draw: Callable[[], object]) -> None:
    """Writes and prints a report, and has its plot drawn where matplotlib is."""
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    if importlib.util.find_spec("matplotlib"):
        draw()
    print(text)
