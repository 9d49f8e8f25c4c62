"""Does `hf-swd advise` lead to the best weight decay, and in how many runs?

On the grids of docs/results, between whose values the curves are interpolated; for each task, the constants of the
advice are computed anew from the others:

    python examples/comparisons/follow_advice.py

By real runs of a training script, with a grid to compare with (finished runs are not repeated):

    python examples/comparisons/follow_advice.py --output_dir outputs/follow --seeds 0 --grid 0.1 0.3 1 3 10 -- \\
        examples/language_modeling/run_clm.py --embedded --do_train --do_eval --eval_strategy steps ...
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import shlex
import statistics
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from hf_swd.commands.advise import advise
from hf_swd.commands.forecast import CONSTANTS, Constants, Tried, propose


RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
# Sum of learning rates over a run. Warm-up and linear or cosine schedules alike: half of the steps at the peak.
LM = 3e-3 * 1200 / 2
RATES = {"lm-lr1e-3": LM / 3, "few-digits": 1e-3 * 1050 / 2, "digits": 1e-3 * 1140 / 2, "text": 3e-4 * 100 / 2}
RATES |= {"digits-clipped": RATES["digits"], "width 32, 4800 steps": 4 * LM}
BUDGET = 5  # runs, the first included
ENOUGH = 0.02  # of the loss above the best: what is good enough, if seeds do not differ by more
COLUMNS = ("eval_loss", "best_eval_loss", "final_train_loss", "mean_weight_decay")


def monotone(xs: Sequence[float], ys: Sequence[float]) -> Callable[[float], float]:
    """Cubic interpolation without overshoot (Fritsch and Carlson); constant below the first point, linear above the
    last."""
    chords = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairwise(zip(xs, ys, strict=True))]
    slopes = [chords[0]]
    for i, (left, right) in enumerate(pairwise(chords), start=1):
        near, far = xs[i] - xs[i - 1], xs[i + 1] - xs[i]
        weights = 2 * far + near, far + 2 * near
        slopes.append(sum(weights) / (weights[0] / left + weights[1] / right) if left * right > 0 else 0.0)
    slopes.append(chords[-1])

    def value(x: float) -> float:
        if x <= xs[0]:
            return ys[0]
        if x >= xs[-1]:
            return ys[-1] + slopes[-1] * (x - xs[-1])
        i = bisect_right(xs, x) - 1
        width = xs[i + 1] - xs[i]
        t = (x - xs[i]) / width
        return (
            (1 + 2 * t) * (1 - t) ** 2 * ys[i]
            + t * (1 - t) ** 2 * width * slopes[i]
            + t**2 * (3 - 2 * t) * ys[i + 1]
            + t**2 * (t - 1) * width * slopes[i + 1]
        )

    return value


@dataclass
class Grid:
    """A finished grid of one optimizer on one task, as curves over the logarithm of weight decay."""

    task: str
    optimizer: str
    decays: list[float]
    curves: dict[str, Callable[[float], float]]
    noise: float | None  # standard deviation over seeds, where there are any

    def __post_init__(self) -> None:
        low, high = math.log(self.decays[0]), math.log(self.decays[-1])
        points = [low + (high - low) * i / 1000 for i in range(1001)]
        self.optimum = min(points, key=self.curves["eval_loss"])
        self.best = self.curves["eval_loss"](self.optimum)

    def tried(self, decay: float, error: float = 0.0) -> Tried:
        of = {name: curve(math.log(decay)) for name, curve in self.curves.items()}
        loss = of["eval_loss"]
        return Tried(
            decay,
            loss + error,
            total=of["mean_weight_decay"] * RATES.get(self.task, LM),
            gap=1 - of["final_train_loss"] / loss if "final_train_loss" in of else None,
            rise=1 - of["best_eval_loss"] / loss if "best_eval_loss" in of else None,
        )

    def regret(self, decay: float) -> float:
        return self.curves["eval_loss"](math.log(decay)) - self.best

    @property
    def decides(self) -> bool:
        """Whether its optimum lies inside, and is better than the ends by more than the noise."""
        return all(self.regret(end) > 2 * CONSTANTS.noise * self.best for end in (self.decays[0], self.decays[-1]))


def read_grids() -> list[Grid]:
    rows: dict[tuple[str, str], dict[float, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(RESULTS.glob("*.csv")):
        with file.open() as opened:
            for row in csv.DictReader(opened):
                decay = float(row["weight_decay"])
                # Files of further runs have a task, and no whole grid.
                if "eval_loss" in row and decay > 0 and "task" not in row:
                    rows[row.get("setting") or file.stem, row["optimizer"]][decay].append(row)
    grids = [read_grid(*name, by_decay) for name, by_decay in rows.items() if len(by_decay) > 2]
    # Where the strongest decay is the best, nothing is known of stronger ones.
    return [grid for grid in grids if grid.optimum < math.log(grid.decays[-1]) and "base=" not in grid.optimizer]


def read_grid(task: str, optimizer: str, by_decay: dict[float, list[dict[str, str]]]) -> Grid:
    decays = sorted(by_decay)
    logs = [math.log(decay) for decay in decays]
    curves = {}
    for name in COLUMNS:
        if all(row.get(name) for rows in by_decay.values() for row in rows):
            curves[name] = monotone(
                logs, [statistics.fmean(float(row[name]) for row in by_decay[decay]) for decay in decays]
            )
    repeated = [[float(row["eval_loss"]) for row in rows] for rows in by_decay.values() if len(rows) > 1]
    noise = math.sqrt(statistics.fmean(map(statistics.variance, repeated))) if repeated else None
    return Grid(task, optimizer, decays, curves, noise)


def fit(grids: Sequence[Grid]) -> Constants:
    """What AdamW's grids in which weight decay decides have in common at their best."""
    known = [g for g in grids if g.optimizer == "adamw" and g.decides and {*COLUMNS} <= g.curves.keys()]

    def gap(grid: Grid, factor: float) -> float:
        return grid.tried(math.exp(grid.optimum) * factor).gap or 0.0

    slopes = [(gap(grid, 2 / 3) - gap(grid, 3 / 2)) / (2 * math.log(3 / 2)) for grid in known]
    return replace(
        CONSTANTS,
        gap=statistics.fmean(gap(grid, 1) for grid in known),
        slope=statistics.fmean(slopes),
        total=min(grid.tried(math.exp(grid.optimum)).total or math.inf for grid in known),
    )


def follow(grid: Grid, start: float, constants: Constants, noise: float, seed: int = 0) -> list[Tried]:
    """The runs that the advice asks for, each with an error of its own."""
    generator = random.Random(seed)
    tried: list[Tried] = []
    decay: float | None = start
    while decay is not None and len(tried) < BUDGET:
        tried.append(grid.tried(decay, generator.gauss(0, noise) if noise else 0.0))
        decay = propose(tried, constants=constants).weight_decay
    return tried


def best_of(tried: Sequence[Tried]) -> float:
    return min(tried, key=lambda one: one.loss).weight_decay


def upwards(grid: Grid, start: float) -> list[Tried]:
    """A plain search: three times the weight decay until it gets worse."""
    tried = [grid.tried(start), grid.tried(3 * start)]
    while tried[-1].loss < tried[-2].loss and tried[-1].weight_decay < grid.decays[-1]:
        tried.append(grid.tried(3 * tried[-1].weight_decay))
    return tried


def offline() -> None:
    grids = read_grids()
    print(f"All tasks: {fit(grids)}\n")
    print(
        "| task | optimizer | from | runs | ends at | optimum | regret | good, with noise | times 3: runs | regret |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for grid in grids:
        constants = fit([other for other in grids if other.task != grid.task])
        enough, noise = max(ENOUGH, grid.noise or 0), grid.noise or 0.013
        starts = [0.1 if grid.decays[0] <= 0.1 and grid.optimizer != "adams" else grid.decays[0], grid.decays[-1]]
        for start in starts:
            tried, plain = follow(grid, start, constants, 0), upwards(grid, start)
            repeated = [best_of(follow(grid, start, constants, noise, seed)) for seed in range(200)]
            good = statistics.fmean(grid.regret(decay) <= enough for decay in repeated)
            ends, regret = best_of(tried), grid.regret(best_of(tried))
            missed = "" if regret <= enough else " **missed**"
            print(
                f"| {grid.task} | {grid.optimizer} | {start:g} | {len(tried)} | {ends:.2g} | "
                f"{math.exp(grid.optimum):.2g} | {regret:.3f}{missed} | {100 * good:.0f} % | "
                + (f"{len(plain)} | {grid.regret(best_of(plain)):.3f} |" if start == starts[0] else "| |")
            )
    print(f"\nWith one constant of all tasks halved or doubled, over AdamW's grids from {0.1}:\n")
    for field in fields(Constants):
        for factor in (0.5, 2):
            constants = replace(fit(grids), **{field.name: factor * getattr(fit(grids), field.name)})
            runs = [(g, follow(g, 0.1, constants, 0)) for g in grids if g.optimizer == "adamw" and g.decays[0] <= 0.1]
            worst = max(grid.regret(best_of(tried)) for grid, tried in runs)
            print(f"- {field.name} x {factor:g}: regret at most {worst:.3f}, runs {max(len(t) for _, t in runs)}")


def real(arguments: argparse.Namespace) -> None:
    def train(decay: float, seed: int) -> Path:
        folder = arguments.output_dir / f"{decay:g}-seed{seed}"
        if not (folder / "trainer_state.json").exists():
            options = ["--weight_decay", f"{decay:g}", "--seed", str(seed), "--output_dir", str(folder)]
            command = [sys.executable, *arguments.script, *options, "--overwrite_output_dir"]
            with (folder.parent / f"{folder.name}.log").open("w") as log:
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        return folder

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        folders, decay = [], arguments.start
        while decay is not None and len(folders) < BUDGET:
            folders.append(train(decay, seed))
            advice = advise(folders)
            print("\n".join(advice.lines), end="\n\n")
            decay = advice.proposal.weight_decay if advice.proposal else None
        grid = [train(decay, seed) for decay in arguments.grid]
        if grid:
            ends, best = (min(s.mean for s in advise(some).settings) for some in (folders, grid))
            print(f"seed {seed}: {len(folders)} runs, {ends:.4f}; best of the grid {best:.4f}; {ends - best:+.4f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--start", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--grid", type=float, nargs="*", default=[])
    parser.add_argument("script", nargs="*", help="after --: a script and its arguments")
    arguments = parser.parse_args()
    if bool(arguments.script) != bool(arguments.output_dir):
        parser.error(f"{shlex.join(sys.argv[1:])}: --output_dir and, after --, a script belong together")
    if arguments.script:
        real(arguments)
    else:
        offline()


if __name__ == "__main__":
    main()
