"""Which weight decay to try next, from the results of those that were tried. Plain arithmetic, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Constants:
    """
    What the search takes from finished grids (`examples/comparisons/follow_advice.py` computes the first three anew).

    Args:
        gap: of the evaluation loss, the part by which the training loss is below it at the best weight decay.
        slope: by how much that part falls when weight decay grows by the factor e, near the best.
        total: the least sum of learning rate times decay that was best where a model overfitted.
        rise: part of the evaluation loss; when it has risen by more above its best, the decay was too weak.
        noise: part of the metric by which seeds differ, where runs do not tell.
        matters: sum of learning rate times decay below which no table shows a difference.
    """

    gap: float = 0.36
    slope: float = 0.2
    total: float = 1.8
    rise: float = 0.004
    noise: float = 0.005
    matters: float = 0.1


CONSTANTS = Constants()
_LEAST, _MOST = 2.0, 10.0  # factors of a step into the unknown
_SAME = 1.2  # weight decays no further apart are one
_MOST_IN_A_STEP = 0.1  # of the weights: more than twice what was best anywhere
_WIDE = 4.0  # and those further apart have room between them


@dataclass(frozen=True)
class Tried:
    """
    A weight decay that was tried; means over its seeds.

    Args:
        weight_decay: positive.
        loss: what is minimised: a metric of which more is better has its sign changed.
        total: sum of learning rate times effective decay over the run; `None` if it is not known.
        gap: (evaluation loss - training loss) / evaluation loss at the end; `None` if it is not known.
        rise: (evaluation loss at the end - its minimum) / evaluation loss at the end; `None` if it is not known.
    """

    weight_decay: float
    loss: float
    total: float | None = None
    gap: float | None = None
    rise: float | None = None


@dataclass(frozen=True)
class Parabola:
    """
    A loss over the logarithm of weight decay.

    Args:
        optimum: weight decay at its vertex.
        gain: by how much the loss is lower there than at the best weight decay that was tried.
        curvature: coefficient of the square.
    """

    optimum: float
    gain: float
    curvature: float

    @classmethod
    def through(cls, left: Tried, best: Tried, right: Tried) -> Parabola:
        a, b = (math.log(one.weight_decay / best.weight_decay) for one in (left, right))
        curvature = ((right.loss - best.loss) / b - (left.loss - best.loss) / a) / (b - a)
        slope = (right.loss - best.loss) / b - curvature * b
        if curvature <= 0:  # all three are equal
            return cls(best.weight_decay, 0.0, 0.0)
        return cls(best.weight_decay * math.exp(-slope / (2 * curvature)), slope**2 / (4 * curvature), curvature)

    def above_best(self, weight_decay: float) -> float:
        """By how much the loss is higher there than at the best weight decay that was tried."""
        return self.curvature * math.log(weight_decay / self.optimum) ** 2 - self.gain


@dataclass(frozen=True)
class Proposal:
    """
    Args:
        weight_decay: the next to try; `None` for the best that was.
        reason: why.
        parabola: through the best and its neighbours, where there are two.
    """

    weight_decay: float | None
    reason: str
    parabola: Parabola | None = None


def propose(tried: Sequence[Tried], noise: float | None = None, constants: Constants = CONSTANTS) -> Proposal:
    """
    The next weight decay (two digits), for a metric that has one minimum over the logarithm of weight decay.

    Args:
        tried: distinct weight decays, at least one.
        noise (*optional*): standard error of a loss; by default a part of the best one.
    """
    tried = sorted(tried, key=lambda one: one.weight_decay)
    best = min(tried, key=lambda one: one.loss)
    place = tried.index(best)
    below, above = tried[:place][-1:], tried[place + 1 :][:1]
    noise = constants.noise * abs(best.loss) if noise is None else noise
    if below and above:
        return _between(below[0], best, above[0], noise, constants)
    if above:
        return _weakest(best, above[0], noise, constants)
    if below:
        return _strongest(below[0], best, noise, constants)
    return _single(best, constants)


def bounded(proposal: Proposal, best: Tried, *, diverged: Sequence[float], share: float) -> Proposal:
    """
    A proposal, or a weaker one where training diverged or a step would take too much of the weights.

    Args:
        best: of what was tried.
        diverged: weight decays that ended in NaN or infinity.
        share: largest part of the weights that decay took in a step at the best; 0 if it is not known.
    """
    if proposal.weight_decay is None:
        return proposal
    worst = min((decay for decay in diverged if decay > best.weight_decay), default=math.inf)
    if proposal.weight_decay >= worst:
        decay = math.sqrt(best.weight_decay * worst) or worst / _MOST
        return replace(proposal, weight_decay=rounded(decay), reason=f"{worst:g} ended in NaN or infinity")
    if share * proposal.weight_decay > _MOST_IN_A_STEP * best.weight_decay:
        reason = f"a stronger one would take more than {100 * _MOST_IN_A_STEP:g} % of the weights in a step"
        decay = best.weight_decay * _MOST_IN_A_STEP / share
        goes_on = decay > _SAME * best.weight_decay
        return replace(proposal, weight_decay=rounded(decay) if goes_on else None, reason=reason)
    return proposal


def _single(run: Tried, constants: Constants) -> Proposal:
    is_weak = run.total is not None and run.total < constants.total
    has_gap = run.gap is not None and run.gap > constants.gap - constants.slope / 4
    if _overfits(run, constants) or (is_weak and has_gap):
        least = run.weight_decay * constants.total / run.total if run.total else 0.0
        decay = max(run.weight_decay * _factor(run, constants, _LEAST, _MOST), least)
        return Proposal(rounded(decay), "the training loss is far below the evaluation loss, and decay was weak")
    if is_weak or run.total is None:
        return Proposal(None, "nothing speaks for another weight decay")
    decay = run.weight_decay * _factor(run, constants, 1 / _MOST, 1 / _LEAST)
    return Proposal(rounded(decay), "decay took most of the weights, and the model does not overfit")


def _strongest(below: Tried, best: Tried, noise: float, constants: Constants) -> Proposal:
    overfits = _overfits(best, constants)
    if below.loss - best.loss < noise and not overfits:
        return Proposal(None, f"{below.weight_decay:.3g} made no difference")
    factor = _factor(best, constants, 0, _MOST)
    if overfits or factor > 1 / _LEAST:
        return Proposal(rounded(best.weight_decay * max(factor, _LEAST)), "the strongest decay so far was the best")
    decay = max(best.weight_decay * factor, math.sqrt(below.weight_decay * best.weight_decay))
    return Proposal(rounded(decay), "it was the best, and so strong that the model hardly fits its training data")


def _weakest(best: Tried, above: Tried, noise: float, constants: Constants) -> Proposal:
    matters = best.total is None or best.total > constants.matters
    # Too weak and too strong may be alike, with the best between them.
    is_open = not matters and _overfits(best, constants) and (above.total or 0.0) > constants.matters
    if above.loss - best.loss < noise and not is_open:
        return Proposal(None, f"{above.weight_decay:.3g} made no difference")
    if matters:
        decay = best.weight_decay * _factor(best, constants, 1 / _MOST, 1 / _LEAST)
        return Proposal(rounded(decay), "the weakest decay so far was the best")
    if above.weight_decay <= _WIDE * best.weight_decay:
        return Proposal(None, "weaker is as good as none, and stronger was no better")
    decay = math.sqrt(best.weight_decay * above.weight_decay)
    return Proposal(rounded(decay), "the weakest was the best, with room up to the next")


def _between(below: Tried, best: Tried, above: Tried, noise: float, constants: Constants) -> Proposal:
    if below.total and best.total and below.total < constants.matters < best.total:
        # All that is too weak to matter is one: it stands where it begins to matter, if that is not at the best.
        least = below.weight_decay * constants.matters / below.total
        below = replace(below, weight_decay=max(below.weight_decay, min(least, best.weight_decay / _LEAST)))
    parabola = Parabola.through(below, best, above)
    optimum, room = parabola.optimum, above.weight_decay / best.weight_decay
    if _overfits(best, constants) and optimum < _SAME * best.weight_decay and room > _LEAST:
        decay = best.weight_decay * _factor(best, constants, _SAME, math.sqrt(room))
        return Proposal(rounded(decay), "the best so far still overfits", parabola)
    if parabola.gain < noise or 1 / _SAME < optimum / best.weight_decay < _SAME:
        return Proposal(None, "no more than that is to be gained", parabola)
    return Proposal(rounded(optimum), "it is that optimum", parabola)


def _overfits(run: Tried, constants: Constants) -> bool:
    return run.rise is not None and run.rise > constants.rise


def _factor(run: Tried, constants: Constants, least: float, most: float) -> float:
    """By what weight decay would have to grow for the usual gap, within bounds: it is right within a factor of two."""
    factor = 1.0 if run.gap is None else math.exp((run.gap - constants.gap) / constants.slope)
    return min(max(factor, least), most)


def rounded(decay: float) -> float:
    """To two digits."""
    return float(f"{decay:.2g}")
