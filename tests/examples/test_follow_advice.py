"""examples/comparisons/follow_advice.py: on the grids of docs/results the advice leads where the documents say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "comparisons"))
follow_advice = pytest.importorskip("follow_advice")


@pytest.fixture(scope="module")
def grids():
    return follow_advice.read_grids()


def test_interpolation_goes_through_its_points_and_does_not_overshoot():
    xs, ys = [0.0, 1.0, 3.0, 4.0], [2.0, 1.0, 1.0, 5.0]
    curve = follow_advice.monotone(xs, ys)
    assert [curve(x) for x in xs] == ys and curve(-5.0) == 2.0 and curve(5.0) == 9.0
    assert min(curve(i / 100) for i in range(401)) == pytest.approx(1.0)


def test_one_run_at_the_usual_decay_leads_to_the_best_in_five(grids):
    """Of every task with a table, by constants of the other tasks."""
    tasks = [grid for grid in grids if grid.optimizer == "adamw"]
    assert len(tasks) == 12
    for grid in tasks:
        constants = follow_advice.fit([other for other in grids if other.task != grid.task])
        tried = follow_advice.follow(grid, max(0.1, grid.decays[0]), constants, noise=0)
        assert len(tried) <= 5 and grid.regret(follow_advice.best_of(tried)) < 0.01, grid.task


def test_constants_of_the_package_are_those_of_the_tables(grids):
    fitted, used = follow_advice.fit(grids), follow_advice.CONSTANTS
    for name in ("gap", "slope", "total"):
        assert getattr(used, name) == pytest.approx(getattr(fitted, name), rel=0.02), name


def test_plain_search_stops_where_it_gets_worse(grids):
    (grid,) = (grid for grid in grids if (grid.task, grid.optimizer) == ("lm", "adamw"))
    tried = follow_advice.upwards(grid, 0.1)
    assert [one.weight_decay for one in tried] == pytest.approx([0.1, 0.3, 0.9, 2.7, 8.1])
    assert grid.regret(2.0) == pytest.approx(0.0, abs=1e-6) and math.exp(grid.optimum) == pytest.approx(2.0, rel=0.05)
