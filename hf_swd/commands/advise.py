"""`hf-swd advise`: from the logs of finished runs, which weight decay to try next.

Everything is read from files, without torch or transformers, and without running code of theirs.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .forecast import CONSTANTS, Proposal, Tried, propose, total_decay
from .run_log import TrainingLog, has_decoupled_decay, read_training_log


# Arguments that change nothing in what is trained, by the beginnings of their names.
_IRRELEVANT = tuple(
    "weight_decay seed data_seed output_dir overwrite_output_dir run_name log report_to save eval_ per_device_eval "
    "do_ push_to_hub hub_ disable_tqdm dataloader_ metric_for greater_is local_rank ddp_ resume project trackio "
    "include_ skip_memory restore debug distributed_state deepspeed_plugin fsdp_plugin prediction_loss batch_eval "
    "remove_unused _".split()
)
_LESS_IS_BETTER = ("loss", "perplexity", "error", "wer", "cer", "mse", "mae")  # ends of names of metrics
_DIGITS = {"BF16": 8, "F16": 11}  # binary digits of a number
_ALL = 0.9  # of the logged steps were clipped: then the schedule is constant


@dataclass(frozen=True)
class Metric:
    """What runs are compared by: a key of their evaluations, at the end of a run or at its best."""

    key: str
    greater_is_better: bool
    at_best: bool

    def of(self, run: TrainingLog) -> float:
        """NaN where it was not logged."""
        values = [entry[self.key] for entry in run.evaluations if isinstance(entry.get(self.key), (int, float))]
        if not values:
            return math.nan
        return float((max if self.greater_is_better else min)(values) if self.at_best else values[-1])

    def best(self, settings: Sequence[Setting]) -> Setting:
        return (max if self.greater_is_better else min)(settings, key=lambda setting: setting.mean)


@dataclass(frozen=True)
class Setting:
    """A weight decay and the runs that had it, which differ in their seeds."""

    weight_decay: float
    runs: list[TrainingLog]
    values: list[float]  # of the metric

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Advice:
    """
    What [`advise`] says of runs.

    Args:
        lines (`list[str]`): sentences for a person; the last one is arguments for a Trainer's script.
        metric ([`Metric`]): what runs were compared by.
        settings (`list[Setting]`): weight decays that were tried, growing.
        proposal ([`Proposal`], *optional*): absent where no run had an evaluation.
    """

    lines: list[str]
    metric: Metric
    settings: list[Setting]
    proposal: Proposal | None


def advise(output_dirs: Sequence[str | os.PathLike[str]], metric: str | None = None) -> Advice:
    """
    Says of finished runs whether weight decay mattered, and which one to try next.

    Args:
        output_dirs (paths): each the `output_dir` of a Trainer, a checkpoint, or a `trainer_state.json`; of runs with
            AdamS, AdamW or another optimizer. `training_args.bin` (or `training_args.json`) and the header of the
            saved weights are read where they are. Runs that differ in more than weight decay and seed from most of
            the others are named and left out.
        metric (`str`, *optional*, defaults to that of `load_best_model_at_end`, or else `eval_loss`): key of the
            evaluations that decides.

    Raises:
        FileNotFoundError: no `trainer_state.json` where it was looked for.
        ValueError: no trainer state, fewer than two logs with a learning rate, or a metric that no run has.
    """
    runs = [read_training_log(path) for path in dict.fromkeys(map(Path, output_dirs))]
    same, others = _alike(runs)
    judge = _metric(same[0], metric)
    if metric and all(math.isnan(judge.of(run)) for run in same):
        known = sorted({key for run in same for entry in run.evaluations for key in entry if key.startswith("eval_")})
        raise ValueError(f"metric={metric!r}: no run has it; they have {', '.join(known) or 'no evaluation'}")
    settings = _settings(same, judge)
    if not settings:
        shown = same[-1]
        why = "No weight decay can be judged: no evaluation with a known weight_decay is in the log (eval_strategy)."
        lines = [_head(same), *others, *_decay_of(shown), why, _arguments(shown, shown.weight_decay)]
        return Advice(lines, judge, [], None)
    judged = {id(run) for setting in settings for run in setting.runs}
    lost = f"no finite {judge.key}, or no known weight_decay"
    others += [f"Left out: {run.path} ({lost})." for run in same if id(run) not in judged]
    best = judge.best(settings)
    noise, source = _noise(settings)
    proposal = _propose(settings, best, judge, noise)
    lines = [_head(same), *others]
    if len(same) > 1:
        lines += [*_table(settings, judge), *_disagreements(settings, judge, best)]
        lines += [f"{source} Of the best, weight decay {best.weight_decay:g}:"]
    lines += [*_fit_of(best.runs[0]), *_decay_of(best.runs[0]), *_conclusion(proposal, best, noise)]
    chosen = best.weight_decay if proposal.weight_decay is None else proposal.weight_decay
    return Advice([*lines, _arguments(best.runs[0], chosen)], judge, settings, proposal)


def _alike(runs: list[TrainingLog]) -> tuple[list[TrainingLog], list[str]]:
    """The largest set of runs that differ in weight decay and seed at most, and what the others differ in."""
    traits = [_traits(run) for run in runs]
    keys = [repr(sorted(trait.items())) for trait in traits]
    ((common, _),) = Counter(keys).most_common(1)
    reference = traits[keys.index(common)]
    same: list[TrainingLog] = []
    others = []
    by_seed: dict[tuple[Any, Any], TrainingLog] = {}
    for run, trait, key in zip(runs, traits, keys, strict=True):
        names = sorted(name for name in trait.keys() | reference if trait.get(name) != reference.get(name))
        twin = by_seed.get((run.weight_decay, run.arguments.get("seed"))) if run.arguments else None
        if key != common:
            differences = (f"{name}={trait.get(name)}, not {reference.get(name)}" for name in names)
            others.append(f"Left out: {run.path} ({'; '.join(differences)}).")
        elif twin is not None:
            others.append(
                f"Left out: {run.path} (weight decay and seed are those of {twin.path}; if what differs is the data, "
                "then the logs do not tell)."
            )
        else:
            same.append(run)
            by_seed[run.weight_decay, run.arguments.get("seed")] = run
    return same, others


def _traits(run: TrainingLog) -> dict[str, Any]:
    known = {name: getattr(value, "args", value) for name, value in run.arguments.items()}
    plain = {name: value for name, value in known.items() if not name.startswith(_IRRELEVANT)}
    epochs = run.epochs and f"{run.epochs:.3g}"
    return {**plain, "steps": run.last_step, "epochs": epochs, "saved parameters": run.num_parameters}


def _metric(run: TrainingLog, name: str | None) -> Metric:
    at_best = run.arguments.get("load_best_model_at_end") is True
    own = str(run.arguments.get("metric_for_best_model") or "loss") if at_best else "loss"
    own, key = (text if text.startswith("eval_") else f"eval_{text}" for text in (own, name or own))
    greater = run.arguments.get("greater_is_better") if at_best and key == own else None
    return Metric(key, greater if isinstance(greater, bool) else not key.endswith(_LESS_IS_BETTER), at_best)


def _settings(runs: Sequence[TrainingLog], metric: Metric) -> list[Setting]:
    by_decay: dict[float, list[TrainingLog]] = defaultdict(list)
    for run in runs:
        if run.weight_decay is not None and math.isfinite(metric.of(run)):
            by_decay[run.weight_decay].append(run)
    return [Setting(decay, by_decay[decay], [*map(metric.of, by_decay[decay])]) for decay in sorted(by_decay)]


def _noise(settings: Sequence[Setting]) -> tuple[float, str]:
    """Standard error of a mean over seeds, pooled, and where it is from."""
    repeated = [setting.values for setting in settings if len(setting.values) > 1]
    if repeated:
        freedom = sum(len(values) - 1 for values in repeated)
        deviation = math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / freedom)
        return deviation, f"Seeds differ by {deviation:.2g} (standard deviation)."
    part = CONSTANTS.noise * abs(statistics.fmean(setting.mean for setting in settings))
    return part, f"One seed each: differences below {part:.2g} ({100 * CONSTANTS.noise:g} %) are taken for noise."


def _propose(settings: Sequence[Setting], best: Setting, metric: Metric, noise: float) -> Proposal:
    tried = [_tried(setting, metric) for setting in settings if setting.weight_decay > 0]
    if best.weight_decay > 0:
        return propose(tried, noise / math.sqrt(len(best.values)))
    overfits = (_mean(_rise(run) for run in best.runs) or 0) > CONSTANTS.rise
    rate = sum_of_rates(best.runs[0])
    if tried or not overfits or not rate:
        return Proposal(None, "no weight decay is as good as any, and nothing speaks for one")
    return Proposal(CONSTANTS.total / rate, "the model overfits, without weight decay")


def _tried(setting: Setting, metric: Metric) -> Tried:
    loss, runs = -setting.mean if metric.greater_is_better else setting.mean, setting.runs
    # Other metrics waver from one evaluation to the next, so that their last is below their best, overfitted or not.
    rise = _mean(map(_rise, runs)) if metric.key.endswith("loss") else None
    return Tried(setting.weight_decay, loss, _mean(map(total, runs)), _mean(map(_gap, runs)), rise)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def total(run: TrainingLog) -> float | None:
    """Learning rate times effective weight decay, summed over the run; `None` if it is not known."""
    decays = run.column("swd/weight_decay")
    if len(decays) != len(run.entries):
        if run.weight_decay is None or not has_decoupled_decay(run.optim) or decays:
            return None
        decays = [run.weight_decay] * len(run.entries)
    return total_decay(run.steps, run.column("learning_rate"), decays)


def sum_of_rates(run: TrainingLog) -> float:
    return total_decay(run.steps, run.column("learning_rate"), [1.0] * len(run.entries))


def _eval_losses(run: TrainingLog) -> list[tuple[int, float]]:
    losses = [(entry["step"], entry.get("eval_loss")) for entry in run.evaluations]
    return [(step, loss) for step, loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)]


def _last_loss(run: TrainingLog) -> float | None:
    """Mean of the last logs, since that of one log is mostly noise."""
    losses = run.column("loss")
    return statistics.fmean(losses[-max(1, min(5, len(losses) // 10)) :]) if losses else None


def _gap(run: TrainingLog) -> float | None:
    """A model that saw no sample twice cannot have learnt them by heart."""
    losses, loss = _eval_losses(run), _last_loss(run)
    if not losses or losses[-1][1] <= 0 or loss is None or (run.epochs is not None and run.epochs <= 1):
        return None
    return 1 - loss / losses[-1][1]


def _rise(run: TrainingLog) -> float | None:
    losses = [loss for _, loss in _eval_losses(run)]
    return 1 - min(losses) / losses[-1] if len(losses) > 1 and losses[-1] > 0 else None


# --- what is said ---


def _head(runs: Sequence[TrainingLog]) -> str:
    first = runs[0]
    passes = "" if first.epochs is None else f", {first.epochs:.3g} passes over the training data"
    size = f", {first.num_parameters / 1e6:.3g} M saved parameters" if first.num_parameters else ""
    name, decay = f"{len(runs)} runs that differ in weight decay and seed at most", ""
    if len(runs) == 1:
        name = str(first.path)
        decay = ", weight_decay=" + ("unknown" if first.weight_decay is None else f"{first.weight_decay:g}")
    broken = [f" {run.path}: NaN or infinite from step {run.broken_from} on." for run in runs if run.broken_from]
    optim = first.optim or "unknown optimizer"
    return f"{name}: {first.last_step} steps{passes}, {optim}{size}{decay}.{''.join(broken)}"


def _table(settings: Sequence[Setting], metric: Metric) -> list[str]:
    where = "at its best, as load_best_model_at_end takes it" if metric.at_best else "at the end"
    better = "more" if metric.greater_is_better else "less"
    lines = [
        f"Compared by {metric.key} {where}; {better} is better.",
        f"| weight decay | mean effective decay | seeds | {metric.key}, last | best | training loss |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    last = Metric(metric.key, metric.greater_is_better, at_best=False)
    best = Metric(metric.key, metric.greater_is_better, at_best=True)
    for setting in settings:
        runs = setting.runs
        means = [_mean(mean_decay(run) for run in runs), *(_mean(map(m.of, runs)) for m in (last, best))]
        cells = ["" if mean is None else f"{mean:.4g}" for mean in (*means, _mean(map(_last_loss, runs)))]
        lines.append(f"| {setting.weight_decay:g} | {cells[0]} | {len(runs)} | {' | '.join(cells[1:])} |")
    return lines


def _disagreements(settings: Sequence[Setting], metric: Metric, best: Setting) -> list[str]:
    """Other metrics by which another weight decay is the best, and not by noise."""
    runs = [run for setting in settings for run in setting.runs]
    keys = {key for run in runs for entry in run.evaluations for key in entry if key.startswith("eval_")}
    lines = []
    for key in sorted(keys - {metric.key}):
        other = Metric(key, not key.endswith(_LESS_IS_BETTER), metric.at_best)
        judged = [] if key.endswith(("_runtime", "_per_second", "_time")) else _settings(runs, other)
        same = next((setting.mean for setting in judged if setting.weight_decay == best.weight_decay), None)
        if same is not None and (found := other.best(judged)).weight_decay != best.weight_decay:
            if abs(found.mean - same) > CONSTANTS.noise * abs(same):
                better = (
                    f"{found.weight_decay:g} is the best ({found.mean:.4g}), not {best.weight_decay:g} ({same:.4g})"
                )
                lines.append(f"By {key}, {better}: --metric {key.removeprefix('eval_')} decides by it.")
    return lines


def mean_decay(run: TrainingLog) -> float | None:
    """Weighted by the learning rate: the constant decay that would shrink the weights as much."""
    whole, rates = total(run), sum_of_rates(run)
    return whole / rates if whole is not None and rates else None


def _fit_of(run: TrainingLog) -> list[str]:
    losses, rise, gap, loss = _eval_losses(run), _rise(run), _gap(run), _last_loss(run)
    if rise is None:
        return ["Whether it overfits is not known: eval_loss was logged fewer than twice (eval_strategy, eval_steps)."]
    lines = [f"The evaluation loss fell to the end ({losses[-1][1]:.4g}), or nearly."]
    if rise > CONSTANTS.rise:
        step, least = min(losses, key=lambda one: one[1])
        trained = [entry["loss"] for entry in run.entries if "loss" in entry and entry["step"] <= step]
        went = f", while the training loss went from {trained[-1]:.4g} to {loss:.4g}" if trained else ""
        rose = f"was lowest at step {step} ({least:.4g}), and has risen to {losses[-1][1]:.4g} since"
        lines = [f"It overfits: the evaluation loss {rose}{went}."]
    if gap is not None:
        usual = f"at the best weight decay of other tasks that was about {100 * CONSTANTS.gap:.0f} %"
        lines.append(f"The training loss ends {100 * gap:.0f} % below it; {usual}.")
    elif run.epochs is not None and run.epochs <= 1:
        lines.append("No sample was seen twice, so there is little that it could have learnt by heart.")
    return lines


def _decay_of(run: TrainingLog) -> list[str]:
    whole = total(run)
    decays = run.column("swd/weight_decay")
    lines = []
    if whole is None:
        lines.append(
            f"What part of the weights decay took cannot be said: {run.optim or 'its optimizer'} is not known to have "
            "decoupled decay, or its weight_decay is not known (training_args.bin)."
        )
    elif whole == 0:
        lines.append("There was no weight decay.")
    else:
        matters = "" if whole >= CONSTANTS.matters else ", too little to matter in any task that was measured"
        lines.append(f"Decay took {100 * -math.expm1(-whole):.3g} % of the weights in all{matters}.")
    if decays:
        lines.append(f"Its schedule went from {decays[0]:.3g} to {decays[-1]:.3g}, {mean_decay(run):.3g} in the mean.")
    lines += _rounding_of(run)
    norms, limit = run.column("grad_norm"), run.max_grad_norm
    clipped = sum(norm > limit for norm in norms) if limit else 0
    if norms and clipped >= _ALL * len(norms):
        lines.append(
            f"{clipped} of {len(norms)} logged steps were clipped to {limit:g}, so a schedule by the clipped gradient "
            "is constant. AdamS has the option unclipped_norm, which was no better in any task that was measured."
        )
    return lines


def _rounding_of(run: TrainingLog) -> list[str]:
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
    if proposal.optimum is not None and proposal.gain is not None:
        lines.append(
            f"A parabola through it and its neighbours has its optimum at {proposal.optimum:.3g}, better by "
            f"{proposal.gain:.2g}; the noise is {noise / math.sqrt(len(best.values)):.2g}."
        )
    if proposal.weight_decay is None:
        return [*lines, f"Stop here, at {best.weight_decay:g}: {proposal.reason}."]
    return [*lines, f"Next: {proposal.weight_decay:g}, because {proposal.reason}."]


def _arguments(run: TrainingLog, weight_decay: float | None) -> str:
    """The run's own optimizer, with this weight decay."""
    options = ",".join(f"{key}={value}" for key, value in run.optim_args.items())
    parts = [f"--optim {run.optim}"] if run.optim else []
    parts += [f"--weight_decay {weight_decay:g}"] if weight_decay is not None else []
    parts += [f"--optim_args {options}"] if options else []
    return " ".join(parts)
