"""An optimizer with a schedule and the reference, taken through the same edits: steps, clipping, groups, state,
copies, checkpoints.

Every operation is applied to both. The optimizer gets it as a user (or an engine) would write it; the reference moves
its float64 moments, which are kept parameter by parameter, and knows nothing of sums, caches or entries.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference_adams import ReferenceAdamS, as_real64, fresh_state
from torch import Tensor
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay


Group = dict[str, Any]

HALF = (torch.float16, torch.bfloat16)
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
# float64: two summations of the same numbers, a few hundred steps long. float32: the norm, the kernels and a rebuilt
# sum each round to 1e-7 or so a step. Low precision: Adam's own moments say nothing, but the sums are taken of the
# gradients, in float64.
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Where a clipped gradient of low precision was rounded, or AMSGrad's maxima were.
LOOSE_RTOL = 2e-2


def real_dtype(p: Tensor) -> torch.dtype:
    return torch.empty(0, dtype=p.dtype).real.dtype if p.is_complex() else p.dtype


def through_file(obj: Any, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def _norm(gradients: dict[Parameter, Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients.values()))


class Reference(ReferenceAdamS):
    """The reference; `measured` holds sums (by id of a parameter's state) that are known from moments of low
    precision."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.measured: dict[int, float] = {}

    def _second_moment_sum(self, group: Group, s: dict) -> float:
        if id(s) in self.measured:
            return max(self.measured[id(s)], s["v"].sum().item())
        return super()._second_moment_sum(group, s)


@dataclass
class Checkpoint:
    """What was saved of a run: `state_dict` as a user saves it, `raw_*` as an engine does that knows only groups and
    state."""

    state_dict: dict
    schedule: dict | None
    raw_groups: list[Group]
    raw_states: list[dict]
    params: list[list[Tensor]]
    reference: Reference
    shown: bool
    loose: bool


class MirroredRun:
    """
    An optimizer and the reference in the same state.

    Args:
        groups: parameter groups (the reference's keys only).
        owner: `"adams"`, or `"adamw"` for a `ScheduledWeightDecay` on torch's AdamW.
        path: what chooses the kernels: `{"fused": True}`, `{"foreach": True}`, ...
        reference_steps, unclipped_norm: options of the schedule.
        hyper: the other hyperparameters of both.
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        owner: str = "adams",
        path: Group | None = None,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        **hyper: Any,
    ) -> None:
        self.owner, self.path = owner, path or {}
        self.schedule_options = {"reference_steps": reference_steps, "unclipped_norm": unclipped_norm}
        self.hyper = {"lr": 1e-2, "weight_decay": 1e-2, **hyper}
        self.optimizer, self.schedule = self.build(groups)
        self.reference = Reference(groups, **self.schedule_options, **self.hyper)
        self.loose = False
        self._due, self._abandoned = 1.0, False
        self._changed: set[Parameter] = set()
        self._dirty = False  # edited since the schedule has looked last
        self._written = False  # the groups, too
        self._forget_gradients()
        self._shown = False  # whether group["weight_decay"] is the reference's: nothing was assigned since the step

    def build(self, groups: list[Group], **options: Any) -> tuple[torch.optim.Optimizer, Any]:
        """An optimizer and its schedule, as this run's were built but for `options`."""
        schedule_options = {key: options.pop(key, value) for key, value in self.schedule_options.items()}
        arguments = {**self.hyper, **self.path, **options}
        if self.owner == "adams":
            optimizer = AdamS([dict(group) for group in groups], **arguments, **schedule_options)
            return optimizer, optimizer.schedule
        optimizer = torch.optim.AdamW([dict(group) for group in groups], **arguments)
        return optimizer, ScheduledWeightDecay(optimizer, **schedule_options)

    # Reading

    @property
    def groups(self) -> list[Group]:
        return self.optimizer.param_groups

    @property
    def params(self) -> list[Parameter]:
        return [p for group in self.groups for p in group["params"]]

    @property
    def states(self) -> list[dict]:
        """The reference's states, in the order of `params`."""
        return [s for group in self.reference.groups for s in group["state"]]

    @property
    def low_precision(self) -> bool:
        return any(p.dtype in HALF for p in self.params)

    @property
    def rtol(self) -> float:
        return LOOSE_RTOL if self.loose else max(RTOL[real_dtype(p)] for p in self.params)

    @property
    def deferred(self) -> bool:
        """Whether `p.grad` is yet to be scaled."""
        return self._due < 1.0

    @property
    def amsgrad(self) -> bool:
        return any(group["amsgrad"] for group in self.groups)

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    # Gradients

    def _forget_gradients(self) -> None:
        self._abandoned |= self._due < 1.0
        self.seen: dict[Parameter, Tensor] = {}  # what Adam is to see
        self.before: dict[Parameter, Tensor] = {}  # what that was before it was clipped
        self._clip = "none"  # "valid"; "moved": groups or state were edited since; "changed": the gradients were
        self._due = 1.0
        for p in self.params:
            p.grad = None

    def give(self, gradients: list[Tensor | None]) -> None:
        """New gradients, in the order of `params`."""
        self._forget_gradients()
        for p, g in zip(self.params, gradients, strict=True):
            if g is not None:
                p.grad = g.to(p.dtype).clone()
                self.seen[p] = self.before[p] = as_real64(p.grad)

    def random_gradients(self, seed: int, scale: float = 0.1, missing=(), zero=()) -> list[Tensor | None]:
        """Gradients of order `scale`; the parameters at the positions `missing` have none, those at `zero` zeros."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(p.shape, dtype=torch.complex128 if p.is_complex() else torch.float64, generator=generator)
                 for p in self.params]  # fmt: skip
        return [None if i in missing else g * (0.0 if i in zero else scale) for i, g in enumerate(drawn)]

    def clip(self, max_norm: float, defer: bool = False) -> None:
        settled = self._due < 1.0 and self._clip != "changed"
        if settled and self.low_precision:
            self.loose = True  # it is measured again after it was rounded
        actual = {p: as_real64(p.grad) for p in self.seen}
        base = dict(self.seen) if settled else actual
        if not settled:
            self._due = 1.0
        clipper = self.optimizer if self.owner == "adams" else self.schedule
        options = {"defer": True} if defer and self.owner == "adams" else {}
        self._abandoned = False
        self.reference.take_over()

        returned = float(clipper.clip_grad_norm_(max_norm, **options))

        rtol = LOOSE_RTOL if settled and self.low_precision else 1e-5
        if settled and self._clip == "moved" and not math.isclose(returned, _norm(base), rel_tol=rtol):
            base = actual  # a deferred clipping that was not of these gradients only is given up for the new one
        norm = _norm(base)
        assert math.isclose(returned, norm, rel_tol=rtol), f"norm {returned!r} instead of {norm!r}"
        factor = min(1.0, max_norm / (norm + 1e-6))
        self.before = base
        self.seen = {p: g * factor for p, g in base.items()}
        self._clip = "valid"
        # AMSGrad's gradients are clipped at once.
        self._due = factor if options and not self.amsgrad else 1.0

    def change_gradient(self, p: Parameter, factor: float, *, replace: bool = False) -> None:
        """Multiply a gradient in place, or put another in its place."""
        if replace:
            p.grad = p.grad * factor
        else:
            p.grad.mul_(factor)
        if self._clip in ("valid", "moved"):
            self._clip, self._changed = "changed", set()
        self._changed.add(p)
        if self._due == 1.0:
            self.seen = {q: as_real64(q.grad) for q in self.seen}
            self.before = dict(self.seen)

    def _edited(self) -> None:
        """Groups or state are no longer those at the time of clipping."""
        if self._clip == "valid":
            self._clip = "moved"
            self.loose |= self.low_precision  # what was clipped is perhaps measured again, after it was rounded

    # A step

    def step(self, *, closure: bool = False) -> None:
        """One step of both, compared; or, where a step must not be made of these gradients, a clear error that leaves
        the weights."""
        must_raise, may_raise = self._expected_errors()
        self._written = False
        before = self.snapshot()
        old_rms = self._grad_rms()
        maxima = self._amsgrad_sums()
        try:
            self.optimizer.step(*([lambda: 0.0] if closure else []))
        except RuntimeError as error:
            assert must_raise or may_raise, f"step() raised {error!r}"
            for p, old in zip(self.params, before, strict=True):
                # float16 makes NaN of zero gradients, since eps is 0 in it.
                assert torch.equal(as_real64(p).nan_to_num(), as_real64(old).nan_to_num()), (
                    "weights have changed in a step that raised"
                )
            self._consumed()
            return
        assert not must_raise, "step() was made of gradients that it cannot know"
        if not self.seen:
            self.reference.take_over()
            # What an engine has put into the groups is looked at now.
            expected = {old_rms, self.reference.grad_rms}
            assert any(math.isclose(self._grad_rms(), rms, rel_tol=self.rtol) for rms in expected), "no gradients"
            self._consumed()
            return
        self.reference.measured = maxima
        lists = [
            [[source.get(p) for p in group["params"]] for group in self.groups] for source in (self.seen, self.before)
        ]
        self.reference.step(*lists)
        self.reference.measured = {}
        self._shown = any(g.numel() for g in self.seen.values())
        if self._shown:
            self.compare()
        self._dirty = False
        self._consumed()

    def _consumed(self) -> None:
        self._due, self._abandoned = 1.0, False
        self._forget_gradients()

    def _expected_errors(self) -> tuple[bool, bool]:
        must, may = False, self._abandoned  # a deferred clipping whose gradients are gone
        if self._clip == "changed" and self._due < 1.0:
            must = True
        if self._clip == "moved":
            may = True
        if self.reference.unclipped_norm and self._clip in ("none", "changed"):
            nonzero = any(g.any() for g in self.seen.values())
            must, may = must or nonzero, True
        return must, may

    def _amsgrad_sums(self) -> dict[int, float]:
        """Sums of AMSGrad's maximum after the coming step as the moments of low precision give them."""
        if not (self.low_precision and self.amsgrad) or self.reference.unclipped_norm:
            return {}
        self.loose = True
        sums = {}
        for mine, group in zip(self.groups, self.reference.groups, strict=True):
            for p, s in zip(mine["params"], group["state"], strict=True):
                if p in self.seen:
                    second = (1 - group["betas"][1]) * self.seen[p].square()
                    state = self.optimizer.state.get(p, {})
                    if "exp_avg_sq" in state:
                        moment, maximum = (as_real64(state[key]) for key in ("exp_avg_sq", "max_exp_avg_sq"))
                        second = torch.maximum(maximum, group["betas"][1] * moment + second)
                    sums[id(s)] = second.sum().item()
        return sums

    def _grad_rms(self) -> float:
        return float((self.optimizer if self.owner == "adams" else self.schedule).grad_rms)

    def compare(self) -> None:
        """After a step."""
        self.compare_schedule()
        if self.low_precision:
            return
        for i, (mine, group) in enumerate(zip(self.groups, self.reference.groups, strict=True)):
            for j, (p, expected) in enumerate(zip(mine["params"], group["params"], strict=True)):
                actual = as_real64(p)
                assert actual.isfinite().all(), f"parameter {j} of group {i} is not finite"
                if p.numel():
                    # Weights are of order 1; where they were decayed to nothing, it is their former size that was
                    # rounded.
                    deviation = ((actual - expected).abs().max() / max(1.0, expected.abs().max().item())).item()
                    assert deviation <= self.rtol, f"parameter {j} of group {i}: {deviation:.2e}"

    def compare_schedule(self) -> None:
        """What is shown of the last step: right after it, and again after a load."""
        if not self._shown:
            return
        rms = self._grad_rms()
        assert math.isclose(rms, self.reference.grad_rms, rel_tol=self.rtol), (
            f"grad_rms {rms!r} instead of {self.reference.grad_rms!r}"
        )
        assert self.schedule.step_count == self.reference.steps, (
            f"step_count {self.schedule.step_count} instead of {self.reference.steps}"
        )
        for i, (mine, group) in enumerate(zip(self.groups, self.reference.groups, strict=True)):
            decay, expected = float(mine["weight_decay"]), group["decay"]
            if expected is None or (self.reference.v_bar == 0 and group["lr"] == 0):
                continue
            assert math.isclose(decay, expected, rel_tol=self.rtol), (
                f"decay of group {i}: {decay!r} instead of {expected!r}"
            )

    # Edits of groups

    def set(self, index: int, key: str, value: Any) -> None:
        """Assign lr, betas or weight_decay of a group."""
        group = self.groups[index]
        if key == "weight_decay" and value in (float(group[key]), group.get("scheduled_weight_decay")):
            return  # cannot be told from the schedule's own
        self.groups[index][key] = value
        self.reference.groups[index][key] = value
        self._shown = False

    def add_group(self, group: Group) -> None:
        self._edited()
        self.reference.add_group(group)
        self.optimizer.add_param_group({**group, "params": list(group["params"])})
        self._shown, self._dirty = False, True

    def remove_group(self, index: int) -> None:
        self._decide()
        for p in self.groups[index]["params"]:
            self._drop(p)
        del self.groups[index], self.reference.groups[index]
        self._shown = False

    def clear_groups_and_add_them_anew(self) -> None:
        """The same parameters in new groups; their state stays."""
        if self._written:  # numbers in groups that nobody has looked at are gone with them
            self.look()
        self._edited()
        keys = ("lr", "betas", "weight_decay", "amsgrad", "maximize", "eps")
        new = [{key: group[key] for key in keys} for group in self.reference.groups]
        parameters = [group["params"] for group in self.groups]
        options = {}
        if (self.reference.reference_steps, self.reference.unclipped_norm) != tuple(self.schedule_options.values()):
            # A checkpoint brought others than the constructor's.
            options = {
                "reference_steps": self.reference.reference_steps,
                "unclipped_norm": self.reference.unclipped_norm,
            }
        self.groups.clear()
        for group, params in zip(new, parameters, strict=True):
            self.optimizer.add_param_group({**group, **self.path, **options, "params": list(params)})
        self._shown, self._dirty = False, True

    def set_path(self, path: Group) -> None:
        """Other kernels from now on."""
        self.path = path
        for group in self.groups:
            group.update({"foreach": None, "fused": None, **path})

    def _decide(self) -> None:
        """Have another optimizer's steps counted before they are gone: it is open when between two steps the schedule
        looks for them."""
        if self.reference.steps == 0 and any(s["v"].any() for s in self.states):
            self.look()

    def _locate(self, p: Parameter) -> tuple[int, int]:
        for i, group in enumerate(self.groups):
            for j, q in enumerate(group["params"]):
                if q is p:
                    return i, j
        raise AssertionError("not a parameter of this run")

    def _drop(self, p: Parameter) -> dict:
        """Forget what is known of a parameter that goes; its state in the optimizer, too."""
        self._edited()
        self.seen.pop(p, None)
        self.before.pop(p, None)
        p.grad = None
        self._changed.discard(p)
        if self._clip == "changed" and not self._changed:  # the change is gone with the gradient
            self._clip = "moved"
        return self.optimizer.state.pop(p, {})

    def add_param(self, index: int, p: Parameter) -> None:
        """Append a parameter to a group's list, as FSDP and PEFT do."""
        self._edited()
        self.groups[index]["params"].append(p)
        self.reference.groups[index]["params"].append(as_real64(p))
        self.reference.groups[index]["state"].append(fresh_state(as_real64(p)))

    def take_out(self, p: Parameter) -> tuple:
        """Remove a parameter and keep what `put_back` needs to add it again as it was."""
        if self._dirty:  # a state that is edited and at once taken out of the optimizer is out of anybody's sight
            self.look()
        self._decide()
        i, j = self._locate(p)
        del self.groups[i]["params"][j]
        group = self.reference.groups[i]
        return p, self._drop(p), group["params"].pop(j), group["state"].pop(j)

    def put_back(self, index: int, kept: tuple) -> None:
        p, state, *mirror = kept
        self._edited()
        self.groups[index]["params"].append(p)
        if state:
            self.optimizer.state[p] = state
        for key, value in zip(("params", "state"), mirror, strict=True):
            self.reference.groups[index][key].append(value)

    def move(self, p: Parameter, index: int) -> None:
        """To another group; state and gradient go with it."""
        i, j = self._locate(p)
        self._edited()
        self.groups[index]["params"].append(self.groups[i]["params"].pop(j))
        for key in ("params", "state"):
            self.reference.groups[index][key].append(self.reference.groups[i][key].pop(j))

    def replace(self, p: Parameter, new: Parameter, *, keep_state: bool) -> None:
        """Another parameter in the place of one; with `keep_state` it is the same one, moved (as `model.to` may
        do)."""
        self._decide()
        i, j = self._locate(p)
        state = self._drop(p)
        self.groups[i]["params"][j] = new
        group = self.reference.groups[i]
        if keep_state:
            if state:
                self.optimizer.state[new] = state
        else:
            group["params"][j] = as_real64(new)
            group["state"][j] = fresh_state(as_real64(new))

    # Edits of state

    def _state_of(self, p: Parameter) -> dict:
        i, j = self._locate(p)
        return self.reference.groups[i]["state"][j]

    def _reset(self, s: dict) -> None:
        s.update(fresh_state(s["m"]))

    def pop_state(self, p: Parameter) -> None:
        self._decide()
        self.optimizer.state.pop(p, None)
        self._reset(self._state_of(p))

    def clear_state(self) -> None:
        self._decide()
        self.optimizer.state.clear()
        for s in self.states:
            self._reset(s)

    def scale_state(self, p: Parameter, factor: float, *, replace: bool = False) -> None:
        """Scale the second moment (and the maximum, which must not be below it) in place, or put others in their
        places."""
        if self._written:  # a state that nobody has looked at cannot be seen to change: it tells by its step alone
            self.look()
        state, s = self.optimizer.state.get(p, {}), self._state_of(p)
        if "exp_avg_sq" not in state:
            return
        self._dirty = True
        for name in ("v", "v_max"):
            key = MOMENTS[name]
            if key in state and replace:
                state[key] = state[key] * factor
            elif key in state:
                state[key].mul_(factor)
            s[name] = s[name] * factor
        self._rebuilt(p)

    def look(self) -> None:
        """A step without gradients, at which the schedule sees what was edited, and changes nothing."""
        self._forget_gradients()
        self.step()

    def set_step(self, p: Parameter, step: int) -> None:
        self._decide()
        state = self.optimizer.state.get(p, {})
        if "step" in state:
            self._dirty = True
            state["step"].fill_(step)
            self._state_of(p)["t"] = step
            self._rebuilt(p)

    def pop_entries(self, p: Parameter, names: Sequence[str] = ("second_moment_sum", "second_moment_step")) -> None:
        """Remove the schedule's own entries; Adam's stay."""
        state = self.optimizer.state.get(p, {})
        present = [key for key in names if key in state]
        for key in present:
            del state[key]
        if present:
            self._rebuilt(p)

    def _rebuilt(self, p: Parameter) -> None:
        """From now on the sum of this parameter is that of the moment that the optimizer holds."""
        state, s = self.optimizer.state.get(p, {}), self._state_of(p)
        if p.dtype in HALF and "exp_avg_sq" in state:
            for name, key in MOMENTS.items():
                if key in state:
                    s[name] = as_real64(state[key])
        s["u"] = s["v"].clone()

    # Copies and checkpoints

    def copied(self, way: str) -> None:
        """Go on with a copy of the optimizer and its parameters (`"deepcopy"` or `"pickle"`)."""
        if self.owner == "adamw" and self._dirty:
            # Nobody tells a ScheduledWeightDecay that its optimizer is copied: what was edited must have been seen in
            # a step.
            self.give(self.random_gradients(len(self.params), 0.1))
            self.clip(1.0)
            self.step()
        optimizer = copy.deepcopy(self.optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(self.optimizer))
        self._adopt(optimizer)
        self.compare_schedule_of_copy()

    def compare_schedule_of_copy(self) -> None:
        if self.owner == "adams":
            self.compare_schedule()

    def _adopt(self, optimizer: torch.optim.Optimizer, schedule: Any = None) -> None:
        self.optimizer = optimizer
        if schedule is None:
            schedule = (
                optimizer.schedule
                if self.owner == "adams"
                else ScheduledWeightDecay(optimizer, **self.schedule_options)
            )
        self.schedule = schedule
        self._consumed()

    def save(self, through: str = "deepcopy") -> Checkpoint:
        """`through`: `"deepcopy"` or `"file"`."""
        state_dict = self.optimizer.state_dict()
        for saved, group in zip(state_dict["param_groups"], self.reference.groups, strict=True):
            assert saved["weight_decay"] == group["weight_decay"], "weight_decay of a checkpoint is not the user's"
        return Checkpoint(
            state_dict=copy.deepcopy(state_dict) if through == "deepcopy" else through_file(state_dict),
            schedule=copy.deepcopy(self.schedule.state_dict()) if self.owner == "adamw" else None,
            raw_groups=[
                copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in self.groups
            ],
            raw_states=[copy.deepcopy(dict(self.optimizer.state.get(p, {}))) for p in self.params],
            params=[[p.detach().clone() for p in group["params"]] for group in self.groups],
            reference=copy.deepcopy(self.reference),
            shown=self._shown,
            loose=self.loose,
        )

    def fits(self, saved: Checkpoint) -> bool:
        """Whether the present groups are those of the checkpoint, by number, shape and type."""
        mine = [[(p.shape, p.dtype) for p in group["params"]] for group in self.groups]
        return mine == [[(p.shape, p.dtype) for p in group] for group in saved.params]

    def load(
        self, saved: Checkpoint, *, fresh: bool = False, weights: bool = True, schedule: str = "none", **options: Any
    ) -> None:
        """
        Load a checkpoint.

        Args:
            saved: if it does not fit the present groups, an optimizer is built that it fits.
            fresh: into a new optimizer on new parameters.
            weights: also go back to the weights that were saved.
            schedule: when to call `ScheduledWeightDecay.load_state_dict`: `"before"` or `"after"` the optimizer's, or
            `"none"`.
            options: of the new optimizer, where it is built in another way than the old one.
        """
        if fresh or options or not self.fits(saved):
            self.loose = saved.loose
            self._build_for(saved, options)
            weights = True
        self.loose |= saved.loose
        self._edited()
        if schedule == "before" and saved.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(saved.schedule))
        self.optimizer.load_state_dict(copy.deepcopy(saved.state_dict))
        if schedule == "after" and saved.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(saved.schedule))
        self._go_back(saved, weights)
        self.compare_schedule()

    def _build_for(self, saved: Checkpoint, options: dict[str, Any]) -> None:
        params = [[Parameter(p.clone()) for p in group] for group in saved.params]
        optimizer, schedule = self.build([{"params": group} for group in params], **options)
        self.hyper.update({key: value for key, value in options.items() if key not in self.schedule_options})
        self.schedule_options = {key: options.get(key, value) for key, value in self.schedule_options.items()}
        self._adopt(optimizer, schedule)

    def _go_back(self, saved: Checkpoint, weights: bool) -> None:
        defaults = {**self.reference.defaults, **self.hyper}
        present = [group["params"] for group in self.reference.groups]
        self.reference = copy.deepcopy(saved.reference)
        self.reference.defaults = defaults
        if weights:
            with torch.no_grad():
                for p, old in zip(self.params, (p for group in saved.params for p in group), strict=True):
                    p.copy_(old)
        else:
            for group, params in zip(self.reference.groups, present, strict=True):
                group["params"] = params
        self._shown = saved.shown and self.reference.v_bar > 0

    def write_back(self, saved: Checkpoint, *, raw: bool, in_place: bool) -> None:
        """
        Go back to a checkpoint as an engine does that calls no `load_state_dict`.

        Args:
            saved: it must fit the present groups.
            raw: the groups are those that the optimizer held, not those of its `state_dict()`.
            in_place: copy Adam's moments into those that are there, which must exist; else replace each parameter's
            state.
        """
        self._edited()
        for group, old in zip(self.groups, saved.raw_groups if raw else saved.state_dict["param_groups"], strict=True):
            group.update(copy.deepcopy({key: value for key, value in old.items() if key != "params"}))
        for p, old in zip(self.params, saved.raw_states, strict=True):
            if in_place:
                for key in ("step", *MOMENTS.values()):
                    if key in old:
                        self.optimizer.state[p][key].copy_(old[key])
            elif old:
                self.optimizer.state[p] = copy.deepcopy(old)
            else:
                self.optimizer.state.pop(p, None)
        self.loose |= saved.loose
        self._go_back(saved, weights=True)
        self._shown = False
        self._dirty, self._written = in_place, True
        if in_place:
            for p in self.params:
                self._rebuilt(p)

    def can_write_in_place(self, saved: Checkpoint) -> bool:
        now = [set(MOMENTS.values()) & set(self.optimizer.state.get(p, ())) for p in self.params]
        then = [set(MOMENTS.values()) & set(state) for state in saved.raw_states]
        return now == then

    # Other optimizers

    def _adamw(self, steps: int, seed: int, missing=(), state_dict: dict | None = None) -> torch.optim.AdamW:
        """AdamW on the same parameters, after some steps; from this run's state, or from nothing."""
        self._forget_gradients()
        hyper = {
            key: self.reference.groups[0][key] for key in ("lr", "betas", "weight_decay", "amsgrad", "maximize", "eps")
        }
        adamw = torch.optim.AdamW([{"params": list(group["params"])} for group in self.groups], **hyper, **self.path)
        if state_dict is not None:
            adamw.load_state_dict(state_dict)
            for mine, group in zip(adamw.param_groups, self.reference.groups, strict=True):
                assert mine["weight_decay"] == group["weight_decay"], "AdamW does not run with the user's weight decay"
        else:
            for mine, group in zip(adamw.param_groups, self.reference.groups, strict=True):
                mine.update({key: group[key] for key in hyper})
        for i in range(steps):
            self.give(self.random_gradients(seed + i, missing=missing))
            adamw.step()
            self.reference.adamw_step([[self.seen.get(p) for p in group["params"]] for group in self.groups])
        self._forget_gradients()
        return adamw

    def through_adamw(
        self, steps: int, seed: int, missing=(), *, fresh: bool = False, through: str = "deepcopy"
    ) -> None:
        """Save, go on with AdamW, load what it saves."""
        saved = self.save(through)
        self._forget_gradients()
        adamw = self._adamw(steps, seed, missing, copy.deepcopy(saved.state_dict))
        state_dict = adamw.state_dict()
        state_dict = copy.deepcopy(state_dict) if through == "deepcopy" else through_file(state_dict)
        if fresh:
            optimizer, schedule = self.build([{"params": list(group["params"])} for group in self.groups])
            self._adopt(optimizer, schedule)
        self.optimizer.load_state_dict(state_dict)
        for i, p in enumerate(self.params):
            if steps and i not in missing:
                self._rebuilt(p)
        self._shown = False

    def take_over_adamw(self, steps: int, seed: int, missing=()) -> None:
        """Load the checkpoint of an AdamW that has never seen a schedule."""
        for s in self.states:
            self._reset(s)
        lambdas = [group["weight_decay"] for group in self.reference.groups]
        for group in self.reference.groups:
            group["weight_decay"] = 0.3
        adamw = self._adamw(steps, seed, missing)
        for group, value in zip(self.reference.groups, lambdas, strict=True):
            group["weight_decay"] = value
        self.optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        self.reference.steps, self.reference.reference_rms, self.reference.v_bar = 0, 0.0, 0.0
        for p in self.params:
            self._rebuilt(p)
        self._shown = False

    def detach_and_attach(self, steps: int, seed: int) -> None:
        """Remove a ScheduledWeightDecay, go on with the constant decay, attach another."""
        self.schedule.remove()
        for mine, group in zip(self.groups, self.reference.groups, strict=True):
            assert mine["weight_decay"] == group["weight_decay"], "remove() does not give the user's weight decay back"
        for i in range(steps):
            self.give(self.random_gradients(seed + i))
            self.optimizer.step()
            self.reference.adamw_step([[self.seen.get(p) for p in group["params"]] for group in self.groups])
        self._forget_gradients()
        self.schedule = ScheduledWeightDecay(self.optimizer, **self.schedule_options)
        self.reference.reference_steps = self.schedule_options["reference_steps"]
        self.reference.unclipped_norm = self.schedule_options["unclipped_norm"]
        self.reference.steps, self.reference.reference_rms, self.reference.v_bar = 0, 0.0, 0.0
        for p in self.params:
            self._rebuilt(p)
        self._shown = False
