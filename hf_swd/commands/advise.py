"""`hf-swd advise`: from the log of a finished run, whether weight decay and its schedule matter, and what to set.

Everything is read from files, without torch or transformers, and without running code of theirs.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .forecast import effective_decays, rescaled_decays, total_decay
from .plot import COLOURS, dress, require_matplotlib, save_figure
from .run_log import TrainingLog, read_training_log


_MATTERS = 0.01  # of the weights, over the run
_TARGET = 0.1  # of the weights, over the run: what a decay that matters is said to take
_ALL = 0.9  # of the logged steps were clipped: then the schedule is constant
_AS_ADAMS = ("adamw_hf", "adamw_torch", "adamw_torch_fused")  # nothing is lost by AdamS in their place
_MOVES = 0.1  # relative change of the decay below which AdamS is AdamW


@dataclass(frozen=True)
class Settings:
    """What the schedule is simulated with; `None` is what the run had or, for AdamW's, what is recommended."""

    weight_decay: float | None = None
    reference_steps: int | None = None
    num_parameters: int | None = None


@dataclass(frozen=True)
class Advice:
    """
    What [`advise`] says of a run.

    Args:
        lines (`list[str]`): sentences for a person.
        log ([`TrainingLog`]): what was read.
        simulated (`list[float]`): effective decay of the recommended or given settings at each logged step; empty if
            there is no weight decay to schedule.
    """

    lines: list[str]
    log: TrainingLog
    simulated: list[float]


def advise(output_dir: str | os.PathLike[str], settings: Settings | None = None) -> Advice:
    """
    Says of a finished run whether weight decay mattered, whether a schedule would have moved, and what to set.

    Args:
        output_dir (path): the `output_dir` of a Trainer, a checkpoint, or a `trainer_state.json`; of a run with AdamW
            or with AdamS. `training_args.bin` (or `training_args.json`) and the header of the saved weights are read
            where they are.
        settings ([`Settings`], *optional*): what to simulate in place of the recommendation.

    Raises:
        FileNotFoundError: no `trainer_state.json` where it was looked for.
        ValueError: no trainer state, or fewer than two logs with gradient norm and learning rate.
    """
    settings = settings or Settings()
    log = read_training_log(Path(output_dir))
    adams = _Adams(log, settings)
    lines = [_head(log, adams), *_shrinkage(log), *_clipping(log)]
    simulated: list[float] = []
    if adams.weight_decay:
        simulated = adams.decays()
        lines += _movement(adams, simulated)
    lines += _accuracy(log, _Adams(log, Settings(num_parameters=settings.num_parameters)))
    lines += _recommendation(log, adams, simulated)
    return Advice(lines, log, simulated)


class _Adams:
    """AdamS with the settings that were given, that the run had, or that are recommended for it."""

    def __init__(self, log: TrainingLog, settings: Settings) -> None:
        self.log = log
        self.weight_decay = log.weight_decay if settings.weight_decay is None else settings.weight_decay
        steps = settings.reference_steps
        if steps is None and log.decays and log.optim_args.get("reference_steps", "0").isdecimal():
            steps = int(log.optim_args.get("reference_steps", "0"))
        self.reference_steps = _reference_steps(log) if steps is None else steps
        self.num_parameters = log.num_parameters if settings.num_parameters is None else settings.num_parameters

    @property
    def follows_log(self) -> bool:
        """Whether the run logged the rms that the schedule would have seen."""
        return bool(self.log.rms) and min(self.log.rms) > 0 and (_is_unclipped(self.log) or not _clipped(self.log))

    def decays(self) -> list[float]:
        """By the gradient before clipping; empty if they are not known."""
        if not self.follows_log:
            return self.simulated(clipped=False)
        return rescaled_decays(
            self.log.steps,
            self.log.rms,
            weight_decay=self.weight_decay or 0.0,
            reference_steps=self.reference_steps,
        )

    def simulated(self, *, clipped: bool) -> list[float]:
        """From logged norms alone; empty if the paper's schedule lacks the number of parameters."""
        if not self.weight_decay or not (self.reference_steps or self.num_parameters):
            return []
        return effective_decays(
            self.log.steps,
            self.log.norms,
            weight_decay=self.weight_decay or 0.0,
            reference_steps=self.reference_steps,
            beta2=self.log.beta2,
            max_norm=(self.log.max_grad_norm or 0.0) if clipped else 0.0,
            num_parameters=self.num_parameters or 1,
        )


def _reference_steps(log: TrainingLog) -> int:
    """The warm-up, at least 100 steps (the first gradients are not typical); not more than a third of the run."""
    return max(1, min(max(log.warmup_steps, 100), log.last_step // 3))


def _head(log: TrainingLog, adams: _Adams) -> str:
    size = f"{adams.num_parameters / 1e6:.3g} M saved parameters" if adams.num_parameters else "unknown size"
    decay = "unknown weight_decay" if log.weight_decay is None else f"weight_decay={log.weight_decay:g}"
    clipping = "unknown max_grad_norm" if log.max_grad_norm is None else f"max_grad_norm={log.max_grad_norm:g}"
    text = (
        f"{log.path}: {log.last_step} steps, {len(log.steps)} of them logged; {log.optim or 'unknown optimizer'}, "
        f"{decay}, {clipping}, {size}."
    )
    if log.broken_from is not None:
        text += f" From step {log.broken_from} on, logs are NaN or infinite; what follows is about the others."
    return text


def _shrinkage(log: TrainingLog) -> list[str]:
    shrunk = _shrunk(log)
    if shrunk is None:
        return [
            f"How much weight decay shrank the weights cannot be said: {log.optim or 'its optimizer'} is not known to "
            "have decoupled decay, or its weight_decay is not known (training_args.bin)."
        ]
    if shrunk == 0:
        return ["There was no weight decay: AdamW's usual values are 0.01 to 0.1."]
    shrank = f"Weight decay shrank the weights by {100 * shrunk:.3g} % in all"
    if shrunk < _MATTERS:
        takes = (log.weight_decay or 0.0) * math.log1p(-_TARGET) / math.log1p(-shrunk)
        return [
            f"{shrank}: it did not matter, whatever the optimizer. {100 * _TARGET:.0f} % would take "
            f"weight_decay={takes:.2g}, or {takes / (log.weight_decay or 1):.0f} times the steps or the learning rate."
        ]
    return [f"{shrank}: enough to matter."]


def _shrunk(log: TrainingLog) -> float | None:
    """By what part of themselves the weights shrank; `None` if it is not known."""
    if not log.decays and (log.weight_decay is None or not log.is_decoupled):
        return None
    decays = log.decays or [log.weight_decay or 0.0] * len(log.steps)
    return -math.expm1(-total_decay(log.steps, log.rates, decays))


def _clipped(log: TrainingLog) -> int:
    return sum(norm > log.max_grad_norm for norm in log.norms) if log.max_grad_norm else 0


def _is_unclipped(log: TrainingLog) -> bool:
    """Whether the run's schedule followed the gradient before clipping."""
    return log.optim_args.get("unclipped_norm", "false").lower() in ("true", "1", "yes")


def _clipping(log: TrainingLog) -> list[str]:
    if log.max_grad_norm is None:
        return [f"Whether steps were clipped is not known; the largest logged norm is {max(log.norms):.3g}."]
    if log.max_grad_norm == 0:
        return ["Nothing was clipped."]
    clipped = _clipped(log)
    text = f"{clipped} of {len(log.norms)} logged steps were clipped to {log.max_grad_norm:g}"
    if clipped < _ALL * len(log.norms):
        return [f"{text}: a schedule by the clipped gradient can move."]
    few = sorted(log.norms)[math.ceil(0.95 * len(log.norms)) - 1]
    return [
        f"{text}: a schedule by the clipped gradient would be constant. max_grad_norm={_up(few):g} would clip 5 % of "
        f"them, {_up(max(log.norms)):g} none; unclipped_norm=true schedules by the norm before clipping."
    ]


def _up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _movement(adams: _Adams, decays: Sequence[float]) -> list[str]:
    if not decays:
        return [
            "The paper's schedule (reference_steps=0) cannot be simulated without the number of parameters: no saved "
            "weights were found, give --num_parameters."
        ]
    source = "from the gradient rms that the run logged" if adams.follows_log else "simulated from logged norms alone"
    what = f"AdamS with weight_decay={adams.weight_decay:g} and reference_steps={adams.reference_steps}"
    return [
        f"{what}, by the gradient before clipping: an effective decay of {min(decays):.3g} to {max(decays):.3g}, "
        f"{_mean_decay(adams.log, decays):.3g} in the mean, {decays[-1]:.3g} at the end ({source})."
    ]


def _mean_decay(log: TrainingLog, decays: Sequence[float]) -> float:
    """Weighted by the learning rate: the constant decay that would shrink the weights as much."""
    rates = total_decay(log.steps, log.rates, [1.0] * len(log.steps))
    return total_decay(log.steps, log.rates, decays) / rates if rates else statistics.fmean(decays)


def _accuracy(log: TrainingLog, adams: _Adams) -> list[str]:
    """How far the simulation of AdamS as it was in the run is from what the run logged."""
    simulated = adams.simulated(clipped=not _is_unclipped(log)) if log.decays else []
    if not simulated:
        return []
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(simulated, log.decays, strict=True) if theirs > 0]
    if not errors:
        return []
    return [
        "This run logged its effective decay. The simulation, which knows the logged norms only, differs from it by "
        f"{100 * statistics.median(errors):.2g} % (median), {100 * max(errors):.2g} % at most."
    ]


def _recommendation(log: TrainingLog, adams: _Adams, simulated: Sequence[float]) -> list[str]:
    if not adams.weight_decay:
        return ["Recommended: a weight decay first; then ask again with --weight_decay."]
    options = _kept_options(log)
    if adams.reference_steps:
        options["reference_steps"] = str(adams.reference_steps)
    if log.max_grad_norm and _clipped(log) >= _ALL * len(log.norms):
        options["unclipped_norm"] = "true"
    arguments = f"--optim adams --weight_decay {adams.weight_decay:g}"
    if options:
        arguments += f" --optim_args {','.join(f'{key}={value}' for key, value in options.items())}"
    shrunk = _shrunk(log)
    if shrunk is not None and shrunk < _MATTERS:
        why = "costs nothing, and will change nothing: the decay is too weak here, with any optimizer"
    elif simulated and max(simulated) < (1 + _MOVES) * min(simulated):
        why = f"the decay would move by less than {100 * _MOVES:.0f} %: expect AdamW's result"
    elif not simulated:
        why = "whether its decay would move is not known"
    else:
        mean = _mean_decay(log, simulated)
        why = f"the decay matters and would move, so try it beside AdamW at the same mean decay, {mean:.2g}"
    return [f"Recommended: {arguments} ({why})."]


def _kept_options(log: TrainingLog) -> dict[str, str]:
    """What the recommendation leaves as it is: the optimizer below the schedule, and options of that."""
    kept = {key: value for key, value in log.optim_args.items() if key not in ("reference_steps", "unclipped_norm")}
    if log.optim == "adams":
        return kept
    if not log.is_decoupled or log.optim in _AS_ADAMS:
        return {}
    return {"base": log.optim, **kept}


def draw_advice(advice: Sequence[Advice], output: str | os.PathLike[str]) -> Path:
    """
    Draws the gradient norm of runs, and the effective decay that is simulated for each beside the one that it had.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: unknown image format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 3.5 + 0.19 * len(advice)), layout="constrained")
    norms, decays = figure.subplots(1, 2)
    for index, one in enumerate(advice):
        log, colour = one.log, COLOURS[index % len(COLOURS)]
        norms.plot(log.steps, log.norms, color=colour)
        if log.max_grad_norm:
            norms.axhline(log.max_grad_norm, color=colour, linestyle=":", linewidth=1)
        had = log.decays or [log.weight_decay or 0.0] * len(log.steps)
        decays.plot(log.steps, had, color=colour, linestyle="--")
        if one.simulated:
            decays.plot(log.steps, one.simulated, color=colour)
    norms.set(title="gradient norm", ylabel="L2 norm before clipping", yscale="log")
    norms.legend([Line2D([], [], color="0.3", linestyle=":")], ["max_grad_norm"], frameon=False)
    decays.set(title="effective weight decay", ylabel="decay per step and unit learning rate")
    styles = [Line2D([], [], color="0.3", linestyle=style) for style in ("--", "-")]
    decays.legend(styles, ["in the run", "of AdamS, simulated"], frameon=False)
    for axes in (norms, decays):
        dress(axes)
    lines = [Line2D([], [], color=COLOURS[index % len(COLOURS)]) for index in range(len(advice))]
    figure.legend(lines, [str(one.log.path) for one in advice], loc="outside lower center", frameon=False)
    return save_figure(figure, Path(output))
