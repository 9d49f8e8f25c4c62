"""`hf-swd advise`: from the logs of finished runs, which weight decay to try next.

Everything is read from files, without torch or transformers, and without running code of theirs.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.calibration import MANY_TIMES, USUAL_FOR_ADAMW, proposed_options, with_options
from .forecast import CONSTANTS, Proposal, Tried, bounded, propose, rounded
from .run_log import Run, read_runs


# Arguments that change nothing in what is trained, by the beginnings of their names.
_IRRELEVANT = tuple(
    "weight_decay seed data_seed output_dir overwrite_output_dir run_name log report_to save eval_ per_device_eval "
    "do_ push_to_hub hub_ disable_tqdm dataloader_ metric_for greater_is local_rank ddp_ resume project trackio "
    "include_ skip_memory restore debug distributed_state deepspeed_plugin fsdp_plugin prediction_loss batch_eval "
    "remove_unused _".split()
)
# Ends of names of metrics.
_LESS_IS_BETTER = ("loss", "perplexity", "ppl", "nll", "bpc", "bpb", "error", "wer", "cer", "mse", "mae")
_NO_METRICS = ("_runtime", "_per_second", "_time")
_DIGITS = {"BF16": 8, "F16": 11}  # binary digits of a number
_SO_FAR = "in any task that was tried"
_ALL = 0.9  # of the logged steps were clipped: then the schedule is constant


@dataclass(frozen=True)
class Metric:
    """What runs are compared by: a key of their evaluations, at the end of a run or at its best."""

    key: str
    greater_is_better: bool
    at_best: bool

    def of(self, run: Run) -> float:
        """NaN where it was not logged."""
        values = [value for _, value in run.evaluated(self.key)]
        if self.at_best:
            finite = filter(math.isfinite, values)
            return float((max if self.greater_is_better else min)(finite, default=math.nan))
        return float(values[-1]) if values else math.nan

    @property
    def loss(self) -> str:
        """The loss by which overfitting is told."""
        return self.key if self.key.endswith("loss") else "eval_loss"


@dataclass(frozen=True)
class Setting(Tried):
    """A weight decay that was tried, and the runs that had it, which differ in their seeds."""

    runs: Sequence[Run] = ()
    values: Sequence[float] = ()  # of the metric

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Advice:
    """
    What [`advise`] says of runs.

    Args:
        lines (`list[str]`): sentences for a person; with a proposal, arguments for a Trainer's script are the last.
        left_out (`list[str]`): those of `lines` that name runs which were not compared, and why.
        metric ([`Metric`]): what runs were compared by.
        settings (`list[Setting]`): weight decays that were tried, growing.
        noise (`float`): a difference of the metric that may be chance.
        proposal ([`Proposal`], *optional*): absent where no run had an evaluation.
    """

    lines: list[str]
    left_out: list[str]
    metric: Metric
    settings: list[Setting]
    noise: float = 0.0
    proposal: Proposal | None = None


def advise(output_dirs: Sequence[str | os.PathLike[str]], metric: str | None = None) -> Advice:
    """
    Says of finished runs whether weight decay mattered, and which one to try next.

    Args:
        output_dirs (paths): each the `output_dir` of a Trainer, a checkpoint, a `trainer_state.json`, or a folder of
            runs; with AdamS, AdamW or another optimizer. `training_args.bin` (or `training_args.json`) and the header
            of the saved weights are read where they are. Runs that differ in more than weight decay and seed from most
            of the others are named and left out.
        metric (`str`, *optional*, defaults to that of `load_best_model_at_end`, or else `eval_loss`): key of the
            evaluations that decides.

    Raises:
        FileNotFoundError: no `trainer_state.json` where it was looked for.
        ValueError: no trainer state, fewer than two logs with a learning rate, or a metric that no run has.
    """
    runs = read_runs(output_dirs)
    for run in runs:
        _check(run)
    same, left_out = _alike(runs)
    judge = _metric(same[0], metric)
    if metric and all(math.isnan(judge.of(run)) for run in same):
        known = ", ".join(_keys(same)) or "no evaluation"
        raise ValueError(f"metric={metric!r}: no run has it; they have {known}")
    settings = _settings(same, judge)
    judged = [run for setting in settings for run in setting.runs]
    lost = f"no finite {judge.key}, or no known weight_decay"
    left_out += [_left_out(run, lost) for run in same if settings and run not in judged]
    lines = [_head(judged or same), *map(_broken, filter(lambda run: run.broken, same)), *left_out]
    if not settings:
        misread = _misread(same[-1])
        return Advice([*lines, *_decay_of(same[-1]), _unjudged(same, judge), *misread], left_out, judge, [])
    best = min(settings, key=lambda setting: setting.loss)
    shown = best.runs[0]
    deviation, source = _noise(settings)
    noise = deviation / math.sqrt(len(best.values))
    diverged = [run.weight_decay for run in same if run not in judged and run.weight_decay and _is_broken(run, judge)]
    share = max(run.largest_share for run in best.runs)
    proposal = bounded(_propose(settings, best, noise, judge.loss), best, diverged=diverged, share=share)
    if len(judged) > 1:
        lines += [*_table(settings, judge), *_disagreements(settings, judge, best)]
        lines += [f"{source} Of the best, weight decay {best.weight_decay:g}:"]
    elif judge.key != judge.loss:
        lines += [f"{judge.key} is {best.mean:.4g}; one run does not tell how weight decay changes it."]
    lines += [*_fit_of(shown, judge.loss), *_decay_of(shown)]
    if len(judged) == 1 and (misread := _misread(shown)):
        return Advice([*lines, *misread], left_out, judge, settings, noise, Proposal(best.weight_decay, "misread"))
    lines += _conclusion(proposal, best, noise)
    chosen = best.weight_decay if proposal.weight_decay is None else proposal.weight_decay
    return Advice([*lines, _arguments(shown, chosen)], left_out, judge, settings, noise, proposal)


def _check(run: Run) -> None:
    if len(run.entries) < 2:
        raise ValueError(
            f"{run.state}: {len(run.entries)} of its logs are finite and have a learning_rate, and 2 are the least. "
            "Train with logging_steps below the number of optimizer steps (the Trainer's default is 500)"
        )


def _alike(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The largest set of runs that differ in weight decay and seed at most, and what is said of the others."""
    traits = [_traits(run) for run in runs]
    if not all(run.dtypes for run in runs):  # not everyone keeps the weights
        for trait in traits:
            trait.pop("saved parameters")
    ((usual, _),) = Counter(frozenset(trait.items()) for trait in traits).most_common(1)
    reference = dict(usual)
    same: dict[Any, Run] = {}
    left_out = []
    for run, trait in zip(runs, traits, strict=True):
        names = sorted({name for name, _ in usual ^ trait.items()})
        key = (run.weight_decay, run.arguments.get("seed")) if run.arguments else run.path
        if names:
            differences = (f"{name}={trait.get(name)}, not {reference.get(name)}" for name in names)
            left_out.append(_left_out(run, "; ".join(differences)))
        elif key in same:
            twin = f"weight decay and seed are those of {same[key].path}"
            left_out.append(_left_out(run, f"{twin}; if what differs is the data, then the logs do not tell"))
        else:
            same[key] = run
    return [*same.values()], left_out


def _left_out(run: Run, reason: str) -> str:
    return f"Left out: {run.path} ({reason})."


def _traits(run: Run) -> dict[str, str]:
    """What runs must have in common."""
    epochs = run.epochs and f"{run.epochs:.3g}"
    traits = {"steps": run.last_step, "epochs": epochs, "saved parameters": sum(run.dtypes.values())}
    if run.arguments.get("load_best_model_at_end") is True:  # each may stop early, at a step of its own
        traits |= {"steps": run.planned_steps, "epochs": None}
    traits |= {name: value for name, value in run.arguments.items() if not name.startswith(_IRRELEVANT)}
    return {name: str(getattr(value, "args", value)) for name, value in traits.items() if value is not None}


def _metric(run: Run, name: str | None) -> Metric:
    at_best = run.arguments.get("load_best_model_at_end") is True
    own = str(run.arguments.get("metric_for_best_model") or "loss")
    own, key = (_key(text) for text in (own, name or (own if at_best else "loss")))
    greater = run.arguments.get("greater_is_better") if key == own else None
    return Metric(key, greater if isinstance(greater, bool) else not key.endswith(_LESS_IS_BETTER), at_best)


def _key(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def _keys(runs: Iterable[Run]) -> list[str]:
    """Of the metrics of their evaluations."""
    keys = {key for run in runs for entry in run.evaluations for key in entry}
    return sorted(key for key in keys if key.startswith("eval_") and not key.endswith(_NO_METRICS))


def _settings(runs: Sequence[Run], metric: Metric) -> list[Setting]:
    by_decay: dict[float, list[Run]] = defaultdict(list)
    for run in runs:
        if run.weight_decay is not None and math.isfinite(metric.of(run)):
            by_decay[run.weight_decay].append(run)
    return [_setting(decay, alike, metric) for decay, alike in sorted(by_decay.items())]


def _setting(weight_decay: float, runs: Sequence[Run], metric: Metric) -> Setting:
    values = [metric.of(run) for run in runs]
    return Setting(
        weight_decay,
        loss=statistics.fmean(values) * (-1 if metric.greater_is_better else 1),
        total=_mean(run.total_decay for run in runs),
        gap=_mean(run.gap(metric.loss) for run in runs),
        # Other metrics waver, so that their last is below their best, overfitted or not.
        rise=_mean(run.rise(metric.loss) for run in runs) if metric.key.endswith("loss") else None,
        runs=runs,
        values=values,
    )


def _noise(settings: Sequence[Setting]) -> tuple[float, str]:
    """Standard deviation over seeds, pooled, and where it is from."""
    repeated = [setting.values for setting in settings if len(setting.values) > 1]
    if repeated:
        squares = sum(statistics.variance(values) * (len(values) - 1) for values in repeated)
        deviation = math.sqrt(squares / sum(len(values) - 1 for values in repeated))
        return deviation, f"Seeds differ by {deviation:.2g} (standard deviation)."
    part = CONSTANTS.noise * abs(statistics.fmean(setting.mean for setting in settings))
    return part, f"One seed each: differences below {part:.2g} ({100 * CONSTANTS.noise:g} %) are taken for noise."


def _propose(settings: Sequence[Setting], best: Setting, noise: float, loss: str) -> Proposal:
    tried = [setting for setting in settings if setting.weight_decay > 0]
    if best.weight_decay > 0:
        return propose(tried, noise)
    felt = [setting for setting in tried if setting.total is None or setting.total >= CONSTANTS.matters]
    overfits = (_mean(run.rise(loss) for run in best.runs) or 0) > CONSTANTS.rise
    total = best.runs[0].total_of_one
    if felt or not overfits or not total:
        return Proposal(None, "no weight decay is as good as any, and nothing speaks for one")
    return Proposal(rounded(CONSTANTS.total / total), "the model overfits, without weight decay")


def _is_broken(run: Run, metric: Metric) -> bool:
    return bool(run.broken) or not all(math.isfinite(value) for _, value in run.evaluated(metric.key))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# --- what is said ---


def _broken(run: Run) -> str:
    first, last = run.broken[0], run.broken[-1]
    when = f"from step {first} on" if last == run.training[-1]["step"] else f"at step {first}"
    return f"{run.path}: NaN or infinite {when}."


def _head(runs: Sequence[Run]) -> str:
    first = runs[0]
    steps = f"{first.last_step}" + (f" of {first.planned_steps}" if first.planned_steps > first.last_step else "")
    passes = "" if first.epochs is None else f", {first.epochs:.3g} passes over the training data"
    size = f", {sum(first.dtypes.values()) / 1e6:.3g} M saved parameters" if first.dtypes else ""
    name, decay = f"{len(runs)} runs that differ in weight decay and seed at most", ""
    if len(runs) == 1:
        name = str(first.path)
        decay = ", weight_decay=" + ("unknown" if first.weight_decay is None else f"{first.weight_decay:g}")
    optim = first.optim or "unknown optimizer"
    return f"{name}: {steps} steps{passes}, {optim}{size}{decay}."


def _table(settings: Sequence[Setting], metric: Metric) -> list[str]:
    where = "at its best, as load_best_model_at_end takes it" if metric.at_best else "at the end"
    lines = [
        f"Compared by {metric.key} {where}; {'more' if metric.greater_is_better else 'less'} is better.",
        f"| weight decay | mean effective decay | seeds | {metric.key}, last | best | training loss |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    last, best = (replace(metric, at_best=at_best) for at_best in (False, True))
    for setting in settings:
        rows = [(run.mean_decay, last.of(run), best.of(run), run.last_loss) for run in setting.runs]
        means = map(_mean, zip(*rows, strict=True))
        decay, *others = ("" if mean is None else f"{mean:.4g}" for mean in means)
        lines.append(f"| {setting.weight_decay:g} | {decay} | {len(rows)} | {' | '.join(others)} |")
    return lines


def _disagreements(settings: Sequence[Setting], metric: Metric, best: Setting) -> list[str]:
    """Other metrics by which another weight decay is the best, and not by noise."""
    runs = [run for setting in settings for run in setting.runs]
    lines = []
    for key in _keys(runs):
        if key == metric.key:
            continue
        other = replace(_metric(runs[0], key), at_best=metric.at_best)
        judged = _settings(runs, other)
        found = min(judged, key=lambda setting: setting.loss, default=best)
        ours = next((setting for setting in judged if setting.weight_decay == best.weight_decay), found)
        if abs(found.mean - ours.mean) > CONSTANTS.noise * abs(ours.mean):
            lines.append(
                f"By {key}, {found.weight_decay:g} is the best ({found.mean:.4g}), not {ours.weight_decay:g} "
                f"({ours.mean:.4g}): --metric {key.removeprefix('eval_')} decides by it."
            )
    return lines


def _fit_of(run: Run, loss: str) -> list[str]:
    rise, gap, losses = run.rise(loss), run.gap(loss), run.eval_losses(loss)
    if rise is None:
        return [f"Whether it overfits is not known: {loss} was logged fewer than twice (eval_strategy, eval_steps)."]
    step, least = min(losses, key=lambda one: one[1])
    last = losses[-1][1]
    above = "at its lowest" if last == least else f"{100 * (last / least - 1):.2g} % above its lowest"
    lines = [f"It does not overfit: the evaluation loss ends {above} ({last:.4g})."]
    if rise > CONSTANTS.rise:
        trained = [entry["loss"] for entry in run.entries if "loss" in entry and entry["step"] <= step]
        went = f", while the training loss went from {trained[-1]:.4g} to {run.last_loss:.4g}" if trained else ""
        rose = f"was lowest at step {step} ({least:.4g}), and has risen to {last:.4g} since"
        lines = [f"It overfits: the evaluation loss {rose}{went}."]
    if gap is not None:
        usual = f"at the best weight decay of other tasks that was about {100 * CONSTANTS.gap:.0f} %"
        side = "below" if gap >= 0 else "above"
        lines.append(f"The training loss ends {100 * abs(gap):.0f} % {side} it; {usual}.")
    elif run.is_one_pass:
        lines.append("No sample was seen twice, so there is little that it could have learnt by heart.")
    return lines


def _decay_of(run: Run) -> list[str]:
    total = run.total_decay
    if total is None:
        said = (
            f"What part of the weights decay took cannot be said: {run.optim or 'its optimizer'} is not known to have "
            "decoupled and constant decay, or its weight_decay is not known (training_args.bin)."
        )
    elif total == 0:
        said = "There was no weight decay."
    else:
        matters = "" if total >= CONSTANTS.matters else f": too little to matter {_SO_FAR}"
        said = f"Decay took {100 * -math.expm1(-total):.3g} % of the weights in all{matters}."
    lines = [said]
    decays = run.column("swd/weight_decay")
    if decays and total:
        scheduled = f"It was scheduled, from {decays[0]:.3g} to {decays[-1]:.3g}; its mean is {run.mean_decay:.3g}."
        constant = f"It was {decays[0]:.3g} in every logged step: nothing was scheduled."
        lines.append(scheduled if len({f"{decay:.3g}" for decay in decays}) > 1 else constant)
    lines += _rounding_of(run)
    norms, limit = run.column("grad_norm"), run.number("max_grad_norm")
    clipped = sum(norm > limit for norm in norms) if limit else 0
    if norms and clipped >= _ALL * len(norms) and not _is_unclipped(run):
        lines.append(
            f"{clipped} of {len(norms)} logged steps were clipped to {limit:g}, so a schedule by the clipped gradient "
            f"is constant. AdamS has the option unclipped_norm, which was no better {_SO_FAR}."
        )
    return lines


def _rounding_of(run: Run) -> list[str]:
    """What is lost where update and decay together, about the learning rate, are below half the distance of two
    numbers; DeepSpeed's masters are in float32, whatever is saved."""
    dtype = max(run.dtypes, key=lambda name: run.dtypes[name], default="")
    rate = max(run.column("learning_rate"))
    if dtype not in _DIGITS or not run.weight_decay or not rate or run.arguments.get("deepspeed"):
        return []
    still = 2.0 ** math.ceil(math.log2(rate) + _DIGITS[dtype])
    if still >= 1:
        return []
    return [
        f"Its weights were saved in {dtype}. If trained in it, those above {still:.2g} did not move, since a "
        f"step of {rate:g}, the learning rate, is less than half the distance to the next number there: all of their "
        'decay was lost. Load the model in float32 (dtype="float32") and train with bf16=True.'
    ]


def _conclusion(proposal: Proposal, best: Setting, noise: float) -> list[str]:
    lines = []
    if (parabola := proposal.parabola) is not None:
        lines.append(
            f"A parabola through it and its neighbours has its optimum at {parabola.optimum:.3g}, better by "
            f"{parabola.gain:.2g}; the noise is {noise:.2g}."
        )
    if proposal.weight_decay is None:
        return [*lines, f"Keep {best.weight_decay:g}: {proposal.reason}."]
    return [*lines, f"Next: {proposal.weight_decay:g}, because {proposal.reason}."]


def _unjudged(runs: Sequence[Run], metric: Metric) -> str:
    """Why no weight decay can be judged, and what to do."""
    if all(run.weight_decay is None for run in runs):
        reason = "training_args.bin, which has it, is missing or damaged"
    elif keys := _keys(runs):
        reason = f"no finite {metric.key} was logged; --metric takes {', '.join(keys)}"
    else:
        tenth = max(1, runs[-1].planned_steps // 10)
        reason = "the model was not evaluated during the training; give the Trainer an eval_dataset and add "
        reason += f"--eval_strategy steps --eval_steps {tenth}"
    return f"No weight decay can be judged: {reason}."


def _misread(run: Run) -> list[str]:
    """Of AdamS at a weight decay that is usual for AdamW, but without `reference_steps`, what to do."""
    decay, acted = run.weight_decay or 0.0, run.mean_decay or 0.0
    is_meant = decay < USUAL_FOR_ADAMW or acted < MANY_TIMES * decay
    if run.optim != "adams" or "reference_steps" in _optim_args(run) or is_meant:
        return []
    options = proposed_options(run.planned_steps)
    return [
        f"Next: {decay:g} with {with_options('', options)}. Without it weight_decay is divided by the gradient rms, "
        f"and what acted was {acted:.3g}.",
        _arguments(run, decay, options),
    ]


def _arguments(run: Run, weight_decay: float, options: Mapping[str, Any] | None = None) -> str:
    """The run's own optimizer, with this weight decay and these further options."""
    optim_args = with_options(_optim_args(run), options or {})
    values = {"optim": run.optim, "weight_decay": f"{weight_decay:g}", "optim_args": optim_args}
    return "Arguments: " + " ".join(f"--{name} {value}" for name, value in values.items() if value)


def _optim_args(run: Run) -> str:
    return str(run.arguments.get("optim_args") or "").replace(" ", "")


def _is_unclipped(run: Run) -> bool:
    """Whether its schedule follows the gradient as it is before clipping."""
    return bool(re.search(r"unclipped_norm=(true|1|yes)\b", _optim_args(run), re.IGNORECASE))
