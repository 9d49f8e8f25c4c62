"""An optimizer with a schedule and the reference, taken through the same steps and edits, and compared after each.

Every operation is applied to both. The optimizer gets it as a user (or an engine) would write it; the reference moves
its float64 moments, which are kept parameter by parameter, and takes every mean in two passes.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference_adams import ReferenceAdamS, as_real64, fresh_state
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_swd import AdamS, ScheduledWeightDecay


PATHS = {
    "default": {},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
}
SHAPES = ((5, 3), (7,), (), (2, 3, 4))
# Gradients are of order 0.1, so that a step decays the weights by about 1e-3: an error in the schedule shows in them.
HYPER = {"lr": 1e-2, "weight_decay": 1e-2}
OPTIONS = ("reference_steps", "unclipped_norm", "max_grad_norm")  # of the schedule
HALF = (torch.float16, torch.bfloat16)
# float32 leaves room for 200 rounded updates; half precision is tested against torch's own kernels.
RTOL = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5}
LOOSE_RTOL = 2e-2  # where clipped gradients, or AMSGrad's maxima, are rounded to half precision
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}

Group = dict[str, Any]
Gradients = list[list[Tensor | None]]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest element; 0 for equal tensors, also where both are NaN or inf."""
    actual = as_real64(actual)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if same.all():
        return 0.0
    # What was decayed to nothing had been of order 1, and was rounded then.
    return ((actual - expected)[~same].abs().max() / max(1.0, expected.abs().max().item())).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_real64(a).nan_to_num(), as_real64(b).nan_to_num())


def assert_close(actual: float | Tensor, expected: float, rtol: float, what: str = "value") -> None:
    actual = float(actual)
    assert math.isclose(actual, expected, rel_tol=rtol) or (math.isnan(actual) and math.isnan(expected)), (
        f"{what}: {actual!r} instead of {expected!r}"
    )


def through_file(obj: Any, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


class OutOfMemory(TorchDispatchMode):
    """Inside the block the operator that first writes to a parameter or its state fails; or the first of a name."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str | None = None) -> None:
        super().__init__()
        self.optimizer, self.name = optimizer, name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and self.name in (None, func.overloadpacket.__name__):
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            held = [*params, *(t for t in tree_leaves([*self.optimizer.state.values()]) if isinstance(t, Tensor))]
            storages = {t.untyped_storage().data_ptr() for t in held if t.numel()}
            if any(t.untyped_storage().data_ptr() in storages for t in tree_leaves(args) if isinstance(t, Tensor)):
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@dataclass
class Checkpoint:
    """What was saved of a run: `state_dict` as a user saves it, `raw_*` as an engine does that knows only groups and
    state."""

    state_dict: dict
    raw_groups: list[Group]
    raw_states: list[dict]
    params: list[list[Tensor]]
    reference: ReferenceAdamS
    shown: bool
    loose: bool


class LockStep:
    """
    An optimizer and the reference in the same state.

    Args:
        groups: parameter groups (default: one group with parameters of several shapes).
        owner: "adams", or "adamw" for a `ScheduledWeightDecay` on torch's AdamW.
        path: what chooses the kernels (a value of `PATHS`); not for the reference.
        rtol: bound on the error of the weights after every step (default: by dtype).
        rms_rtol: bound on that of rms and decay.
        kwargs: the other arguments of both.
    """

    def __init__(
        self,
        groups: list[Group] | None = None,
        *,
        owner: str = "adams",
        path: Group | None = None,
        rtol: float | None = None,
        rms_rtol: float | None = None,
        **kwargs: Any,
    ) -> None:
        groups = groups or [{"params": parameters()}]
        self.overrides = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.owner, self.path = owner, path or {}
        self.kwargs = {**HYPER, **kwargs}
        self.rtol = rtol or RTOL.get(groups[0]["params"][0].dtype, math.inf)
        self.rms_rtol = rms_rtol or min(self.rtol, 1e-6)
        self.optimizer = self.build([dict(group) for group in groups])
        self.reference = ReferenceAdamS(groups, **self.kwargs)
        self.seed = 0
        self.loose = False
        self.shown = False
        """Whether the groups show the reference's decay: a step was made, and nothing assigned since."""
        self.stale = False
        """Whether a moment was edited in place, which the schedule may not have noticed yet."""
        # By which it is known whether the next step must read the moments.
        self._renewed, self._replaced, self._stepped = True, set(), []
        self._mean_before = 0.0

    def build(self, groups: list[Group], **options: Any) -> torch.optim.Optimizer:
        """An optimizer as this run's, but for `options`."""
        arguments = {**self.kwargs, **self.path, **options}
        if self.owner == "adams":
            return AdamS(groups, **arguments)
        own = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
        optimizer = torch.optim.AdamW(groups, **arguments)
        ScheduledWeightDecay(optimizer, **own)
        return optimizer

    # Reading

    @property
    def schedule(self) -> Any:
        return self.optimizer.__dict__["_decay_schedule"]

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
    def amsgrad(self) -> bool:
        return any(group["amsgrad"] for group in self.groups)

    # Gradients

    def gradients(
        self,
        missing: Callable[[int, int], bool] = lambda i, step: False,
        *,
        scale: float | None = None,
        zero: Sequence[int] = (),
    ) -> Gradients:
        """New random gradients, whose size changes from step to step unless `scale` is given; `missing(i, step)`:
        parameter i has none; those at the positions `zero` are zero."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        scale = 0.1 * 2 ** math.sin(self.seed / 5) if scale is None else scale
        numbers = iter(range(len(self.params)))

        def gradient(p: Parameter) -> Tensor | None:
            i = next(numbers)
            drawn = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (0.0 if i in zero else scale)
            return None if missing(i, self.seed) else drawn

        return [[gradient(p) for p in group["params"]] for group in self.groups]

    def set_gradients(self, gradients: Gradients, scale: float = 1.0) -> None:
        for group, grads in zip(self.groups, gradients, strict=True):
            for p, g in zip(group["params"], grads, strict=True):
                p.grad = None if g is None else g.clone() * scale

    def present_gradients(self) -> Gradients:
        return [[None if p.grad is None else p.grad.clone() for p in group["params"]] for group in self.groups]

    def clip(self, max_norm: float) -> None:
        """In place, at once; half precision rounds."""
        norm = math.sqrt(sum(as_real64(p.grad).square().sum().item() for p in self.params if p.grad is not None))
        assert_close(self.schedule.clip_grad_norm_(max_norm), norm, 1e-6, "norm")

    # A step

    def step(
        self, gradients: Gradients | None = None, *, call: Callable[[], object] | None = None, scale: float = 1.0
    ) -> None:
        """One step of both, compared. `call` replaces `optimizer.step()`; the optimizer gets `scale` times the
        gradients."""
        gradients = self.gradients() if gradients is None else gradients
        self.set_gradients(gradients, scale)
        self._before_step()
        (call or self.optimizer.step)()
        self.step_reference(gradients)

    def step_with_what_is_there(self, call: Callable[[], object] | None = None) -> None:
        """One step of both with the gradients that the parameters have, which the optimizer may clip."""
        gradients = self.present_gradients()
        flat = [as_real64(g) for group in gradients for g in group if g is not None]
        self._before_step()
        (call or self.optimizer.step)()
        if not flat:
            assert self.schedule.grad_rms**2 == self._mean_before, "a step without gradients"
            return
        norm, max_norm = math.sqrt(sum(g.square().sum().item() for g in flat)), self.groups[0]["max_grad_norm"]
        clipped = gradients
        if max_norm:
            assert_close(self.schedule.grad_norm, norm, 1e-6, "grad_norm")
            factor = min(1.0, max_norm / (norm + 1e-6))
            self.loose |= factor < 1 and self.low_precision
            clipped = [[None if g is None else as_real64(g) * factor for g in group] for group in gradients]
        self.step_reference(clipped, gradients)

    def _before_step(self) -> None:
        """What the optimizer will say of the mean depends on what is there."""
        self._mean_before = self.schedule.grad_rms**2
        if self.low_precision:  # of moments that are rounded at every step, those that are there are the truth
            self.loose |= self.amsgrad
            for p, s in zip(self.params, self.states, strict=True):
                state = self.optimizer.state.get(p, {})
                s.update({name: as_real64(state[key]) for name, key in MOMENTS.items() if key in state})

    def _stale_mean(self, gradients: Gradients) -> float | None:
        """What the recurrence makes of the last mean, if a moment was edited in place, nothing tells the schedule to
        read the moments, and it did not."""
        present = [
            (p, s, float(group["betas"][1]), g)
            for group, mirror, grads in zip(self.groups, self.reference.groups, gradients, strict=True)
            for p, s, g in zip(group["params"], mirror["state"], grads, strict=True)
            if g is not None
        ]
        key = [(id(p), beta2) for p, _, beta2, _ in present]
        is_uniform = len({(s["t"], beta2) for _, s, beta2, _ in present}) <= 1
        must_read = self._renewed or key != self._stepped or not is_uniform or self.amsgrad or self.low_precision
        must_read = must_read or any(p in self._replaced for p, *_ in present)
        self._renewed, self._stepped = False, key
        self._held = [p for p, *_ in present]  # no other parameter gets the `id` of one of these
        self._replaced -= {p for p, *_ in present}
        if must_read or not self.stale or self.reference.unclipped_norm:
            self.stale &= not must_read
            return None
        _, s, beta2, _ = present[0]
        squares = sum(as_real64(g).square().sum().item() for *_, g in present)
        count = sum(s["v"].numel() for _, s, _, _ in present)
        old = beta2 * (1 - beta2 ** s["t"]) * self._mean_before
        mean = (old + (1 - beta2) * squares / max(count, 1)) / (1 - beta2 ** (s["t"] + 1))
        return mean if math.isclose(math.sqrt(mean), self.schedule.grad_rms, rel_tol=self.rms_rtol) else None

    def step_reference(self, gradients: Gradients, unclipped: Gradients | None = None) -> None:
        """The reference's step, with the optimizer's present learning rates and betas; then compare. `unclipped`: what
        gradients were before clipping."""
        for group, mine in zip(self.reference.groups, self.groups, strict=True):
            group.update(lr=float(mine["lr"]), betas=tuple(float(beta) for beta in mine["betas"]))
        self.reference.step(gradients, unclipped, mean=self._stale_mean(gradients))
        self.shown = True
        self.compare()

    def run(self, steps: int, missing: Callable[[int, int], bool] = lambda i, step: False) -> None:
        for _ in range(steps):
            self.step(self.gradients(missing))

    def step_that_raises(self, name: str | None = None) -> None:
        """Out of memory before anything was written: weights and schedule are as they were."""
        gradients, weights = self.present_gradients(), [p.detach().clone() for p in self.params]
        kept = ("schedule_step", "second_moment_mean", "reference_rms", "initial_weight_decay")
        before = [{key: group[key] for key in kept} for group in self.optimizer.state_dict()["param_groups"]]
        try:
            with OutOfMemory(self.optimizer, name):
                self.optimizer.step()
        except torch.OutOfMemoryError:
            pass
        else:
            assert not any(g.numel() for group in gradients for g in group if g is not None), "it did not raise"
        after = [{key: group[key] for key in kept} for group in self.optimizer.state_dict()["param_groups"]]
        assert before == after and all(map(same_bits, self.params, weights))
        self._renewed, self.shown = True, False
        self.set_gradients(gradients)

    def overflow(self) -> None:
        """A step that the optimizer is told to leave out: nothing changes."""
        weights = [p.detach().clone() for p in self.params]
        before = self.schedule.step_count, self.schedule.reference_rms
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf
        assert all(map(same_bits, self.params, weights))
        if self.reference.steps == 0:  # another optimizer's steps may be counted now, of those that have a gradient
            self.reference.steps = self.schedule.step_count
        else:
            assert (self.schedule.step_count, self.schedule.reference_rms) == before
        self.shown = False
        for p in self.params:
            p.grad = None

    def compare(self) -> None:
        self.compare_schedule()
        if self.low_precision and self.rtol == math.inf:
            return
        for i, (mine, group) in enumerate(zip(self.groups, self.reference.groups, strict=True)):
            for j, (p, expected) in enumerate(zip(mine["params"], group["params"], strict=True)):
                deviation = error(p, expected) if p.numel() else 0.0
                assert deviation <= self.rtol, (
                    f"parameter {j} of group {i} after step {self.reference.steps}: {deviation:.2e}"
                )

    def compare_schedule(self) -> None:
        """What is shown of the last step: right after it, and again after a load."""
        if not self.shown:
            return
        where = f"after step {self.reference.steps}"
        rtol = LOOSE_RTOL if self.loose else self.rms_rtol
        assert_close(self.schedule.grad_rms, self.reference.grad_rms, rtol, f"grad_rms {where}")
        if not math.isnan(self.reference.v_bar):
            assert self.schedule.step_count == self.reference.steps
        for i, (mine, group) in enumerate(zip(self.groups, self.reference.groups, strict=True)):
            if group["decay"] is not None and not (self.reference.v_bar == 0 and group["lr"] == 0):
                assert_close(float(mine["weight_decay"]), group["decay"], rtol, f"decay of group {i} {where}")

    # Edits of groups

    def set(self, index: int, key: str, value: Any) -> None:
        """Assign lr, betas or weight_decay of a group."""
        group = self.groups[index]
        if key == "weight_decay" and value in (float(group[key]), group.get("scheduled_weight_decay")):
            return  # cannot be told from the schedule's own
        group[key] = self.reference.groups[index][key] = value
        self.shown = False

    def set_weight_decay(self, index: int, value: float) -> None:
        self.set(index, "weight_decay", value)

    def set_max_grad_norm(self, value: float) -> None:
        for group in self.groups:
            group["max_grad_norm"] = value

    def set_path(self, path: Group) -> None:
        """Other kernels from now on."""
        self.path = path
        for group in self.groups:
            group.update({"foreach": None, "fused": None, **path})

    def add_group(self, group: Group) -> None:
        self.overrides.append({key: value for key, value in group.items() if key != "params"})
        self.reference.add_group(group)
        self.optimizer.add_param_group({**group, "params": list(group["params"])})
        self.shown = False

    def remove_group(self, index: int) -> None:
        for p in self.groups[index]["params"]:
            self._drop(p)
        del self.groups[index], self.reference.groups[index]
        if not any("schedule_step" in group for group in self.groups):  # all that are left have not made a step
            self.reference.forget()
        self.shown = False

    def clear_groups_and_add_them_anew(self) -> None:
        """The same parameters in new groups; their state stays, and is what the schedule begins with."""
        keys = ("lr", "betas", "weight_decay", "amsgrad", "maximize", "eps")
        new = [{key: group[key] for key in keys} for group in self.reference.groups]
        options = {key: self.groups[0][key] for key in OPTIONS}
        parameters = [group["params"] for group in self.groups]
        self.groups.clear()
        for group, params in zip(new, parameters, strict=True):
            self.optimizer.add_param_group({**group, **self.path, **options, "params": list(params)})
        self.reference.forget()
        self.shown = False

    def add_param(self, index: int, p: Parameter) -> None:
        """Append a parameter to a group's list, as FSDP and PEFT do."""
        self._put_into(index, p, {}, as_real64(p), fresh_state(as_real64(p)))

    def take_out(self, p: Parameter) -> tuple:
        """Remove a parameter and keep what `put_back` needs to add it again as it was."""
        i, j = self._locate(p)
        del self.groups[i]["params"][j]
        group = self.reference.groups[i]
        return p, self._drop(p), group["params"].pop(j), group["state"].pop(j)

    def put_back(self, index: int, kept: tuple) -> None:
        self._put_into(index, *kept)

    def move(self, p: Parameter, index: int) -> None:
        """To another group; state and gradient go with it."""
        i, j = self._locate(p)
        self.groups[index]["params"].append(self.groups[i]["params"].pop(j))
        for key in ("params", "state"):
            self.reference.groups[index][key].append(self.reference.groups[i][key].pop(j))

    def replace(self, p: Parameter, new: Parameter, *, keep_state: bool) -> None:
        """Another parameter in the place of one; with `keep_state` it is the same one, moved (as `model.to` may
        do)."""
        i, j = self._locate(p)
        state = self._drop(p)
        self.groups[i]["params"][j] = new
        if keep_state:
            self._replaced.add(new)
            if state:
                self.optimizer.state[new] = state
        else:
            self.reference.groups[i]["params"][j] = as_real64(new)
            self.reference.groups[i]["state"][j] = fresh_state(as_real64(new))

    def swap(self, p: Parameter) -> None:
        """Another tensor in the same parameter, as `model.to` does with DTensors and on demand."""
        gradient, p.grad = p.grad, None
        torch.utils.swap_tensors(p, Parameter(p.detach().clone()))
        p.grad = gradient

    def _locate(self, p: Parameter) -> tuple[int, int]:
        return next((i, j) for i, group in enumerate(self.groups) for j, q in enumerate(group["params"]) if q is p)

    def _put_into(self, index: int, p: Parameter, state: dict, mirror: Tensor, mirror_state: dict) -> None:
        self.groups[index]["params"].append(p)
        self._replaced.add(p)
        if state:
            self.optimizer.state[p] = state
        self.reference.groups[index]["params"].append(mirror)
        self.reference.groups[index]["state"].append(mirror_state)

    def _drop(self, p: Parameter) -> dict:
        p.grad = None
        self._replaced.add(p)
        return self.optimizer.state.pop(p, {})

    # Edits of state

    def _mirror_of(self, p: Parameter) -> dict:
        i, j = self._locate(p)
        return self.reference.groups[i]["state"][j]

    def pop_state(self, p: Parameter) -> None:
        self._replaced.add(p)
        self.optimizer.state.pop(p, None)
        self._mirror_of(p).update(fresh_state(self._mirror_of(p)["m"]))

    def clear_state(self) -> None:
        self._replaced.update(self.params)
        self.optimizer.state.clear()
        for s in self.states:
            s.update(fresh_state(s["m"]))

    def scale_state(self, p: Parameter, factor: float, *, how: str) -> None:
        """Scale the second moment (and the maximum, which must not be below it): `"in place"`, by another tensor
        (`"replaced"`), or by one that may be where the old one was (`"there and back"`)."""
        state, s = self.optimizer.state.get(p, {}), self._mirror_of(p)
        if how != "in place":
            self._replaced.add(p)
        for name in ("v", "v_max"):
            key = MOMENTS[name]
            if key in state and how == "in place":
                state[key].mul_(factor)
                self.stale = True
            elif key in state and how == "replaced":
                state[key] = state[key] * factor
            elif key in state:
                values = state.pop(key) * factor
                state[key] = values.clone()
            if "exp_avg_sq" in state:
                s[name] = s[name] * factor

    def offload(self) -> None:
        """Other tensors of the same numbers."""
        self._replaced.update(self.params)
        for state in self.optimizer.state.values():
            if isinstance(state, dict):
                state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})

    def set_step(self, p: Parameter, step: int) -> None:
        state = self.optimizer.state.get(p, {})
        if "step" in state:
            state["step"].fill_(step)
            self._mirror_of(p)["t"] = step
            self.refresh()

    def refresh(self) -> None:
        self.schedule.refresh()
        self._renewed = True

    # Copies and checkpoints

    def copied(self, way: str) -> None:
        """Go on with a copy of the optimizer and its parameters ("deepcopy" or "pickle")."""
        options = {key: self.groups[0][key] for key in OPTIONS}
        optimizer = copy.deepcopy(self.optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(self.optimizer))
        if self.owner == "adamw":
            ScheduledWeightDecay(optimizer, **options)
        self._adopt(optimizer)
        if self.owner == "adams":
            self.compare_schedule()

    def _adopt(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._renewed = optimizer, True
        for p in self.params:
            p.grad = None

    def save(self, through: str = "deepcopy") -> Checkpoint:
        """`through`: "deepcopy" or "file"."""
        state_dict = self.optimizer.state_dict()
        for saved, group in zip(state_dict["param_groups"], self.reference.groups, strict=True):
            assert saved["weight_decay"] == group["weight_decay"], "weight_decay of a checkpoint is not the user's"
        return Checkpoint(
            state_dict=copy.deepcopy(state_dict) if through == "deepcopy" else through_file(state_dict),
            raw_groups=[
                copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in self.groups
            ],
            raw_states=[copy.deepcopy(dict(self.optimizer.state.get(p, {}))) for p in self.params],
            params=[[p.detach().clone() for p in group["params"]] for group in self.groups],
            reference=copy.deepcopy(self.reference),
            shown=self.shown,
            loose=self.loose,
        )

    def fits(self, saved: Checkpoint) -> bool:
        """Whether the present groups are those of the checkpoint, by number, shape and type."""
        mine = [[(p.shape, p.dtype) for p in group["params"]] for group in self.groups]
        return mine == [[(p.shape, p.dtype) for p in group] for group in saved.params]

    def load(self, saved: Checkpoint, *, fresh: bool = False, weights: bool = True, **options: Any) -> None:
        """
        Load a checkpoint.

        Args:
            saved: if it does not fit the present groups, an optimizer is built that it fits.
            fresh: into a new optimizer on new parameters.
            weights: also go back to the weights that were saved.
            options: of the new optimizer, where it is built in another way than the old one.
        """
        if fresh or options or not self.fits(saved):
            self.kwargs.update(options)
            self._adopt(self.build([{"params": [Parameter(p.clone()) for p in group]} for group in saved.params]))
            self.loose, weights = saved.loose, True
        self.loose |= saved.loose
        self.optimizer.load_state_dict(copy.deepcopy(saved.state_dict))
        self._renewed = True
        self._go_back(saved, weights)
        self.compare_schedule()

    def _go_back(self, saved: Checkpoint, weights: bool) -> None:
        present = [group["params"] for group in self.reference.groups]
        self.reference = copy.deepcopy(saved.reference)
        hyper = {key: value for key, value in self.kwargs.items() if key not in OPTIONS}
        self.reference.defaults = {**self.reference.defaults, **hyper}
        if weights:
            with torch.no_grad():
                for p, old in zip(self.params, (p for group in saved.params for p in group), strict=True):
                    p.copy_(old)
        else:
            for group, params in zip(self.reference.groups, present, strict=True):
                group["params"] = params
        self.shown = saved.shown and self.reference.v_bar > 0

    def write_back(self, saved: Checkpoint, *, raw: bool, in_place: bool) -> None:
        """
        Go back to a checkpoint as an engine does that calls no `load_state_dict`.

        Args:
            saved: it must fit the present groups.
            raw: the groups are those that the optimizer held, not those of its `state_dict()`.
            in_place: copy Adam's moments into those that are there, which must exist, and tell the schedule; else
                replace each parameter's state.
        """
        for group, old in zip(self.groups, saved.raw_groups if raw else saved.state_dict["param_groups"], strict=True):
            params = group["params"]
            group.clear()  # what it lacked then, it lacks now
            group.update(copy.deepcopy({key: value for key, value in old.items() if key != "params"}), params=params)
        self._replaced.update(self.params)
        for p, old in zip(self.params, saved.raw_states, strict=True):
            if in_place:
                for key, value in old.items():
                    self.optimizer.state[p][key].copy_(value)
            elif old:
                self.optimizer.state[p] = copy.deepcopy(old)
            else:
                self.optimizer.state.pop(p, None)
        if in_place:
            self.refresh()
        self.loose |= saved.loose
        self._go_back(saved, weights=True)
        self.shown = False

    def can_write_in_place(self, saved: Checkpoint) -> bool:
        now = [set(self.optimizer.state.get(p, ())) for p in self.params]
        return now == [set(state) for state in saved.raw_states]

    def resumed(self, through: Callable[[dict], dict] = copy.deepcopy) -> LockStep:
        """A fresh optimizer on copies of the weights, which got this one's state_dict (sent `through` something)."""
        other = copy.copy(self)
        other.optimizer = self.fresh_optimizer()
        other.optimizer.load_state_dict(through(self.optimizer.state_dict()))
        other.reference = copy.deepcopy(self.reference)
        other._renewed = True
        return other

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        """Built as this one was, on copies of the weights."""
        groups = [
            {**overrides, "params": [copy.deepcopy(p) for p in group["params"]]}
            for overrides, group in zip(self.overrides, self.groups, strict=True)
        ]
        return self.build(groups)

    # Other optimizers

    def _constant_steps(self, optimizer: torch.optim.Optimizer, steps: int, missing: Sequence[int]) -> None:
        """Steps with the constant decay, of which the schedule learns nothing but the moments."""
        for _ in range(steps):
            gradients = self.gradients(lambda i, step: i in missing)
            self.set_gradients(gradients)
            optimizer.step()
            self.reference.adamw_step(gradients)
        for p in self.params:
            p.grad = None
        self._renewed, self.shown = True, False

    def through_adamw(
        self, steps: int, missing: Sequence[int] = (), *, fresh: bool = False, through: str = "deepcopy"
    ) -> None:
        """Save, go on with AdamW, load what it saves."""
        adamw = torch.optim.AdamW([{"params": list(group["params"])} for group in self.groups], **self.path)
        adamw.load_state_dict(self.save(through).state_dict)
        for mine, group in zip(adamw.param_groups, self.reference.groups, strict=True):
            assert mine["weight_decay"] == group["weight_decay"], "AdamW does not run with the user's weight decay"
        self._constant_steps(adamw, steps, missing)
        state_dict = adamw.state_dict()
        if fresh:
            self._adopt(self.build([{"params": list(group["params"])} for group in self.groups]))
        self.optimizer.load_state_dict(through_file(state_dict) if through == "file" else copy.deepcopy(state_dict))

    def take_over_adamw(self, steps: int, missing: Sequence[int] = ()) -> None:
        """Load the checkpoint of an AdamW that has never seen a schedule."""
        keys = ("lr", "betas", "amsgrad", "maximize", "eps")
        adamw = torch.optim.AdamW(
            [
                {"params": list(mine["params"]), **{key: group[key] for key in keys}}
                for mine, group in zip(self.groups, self.reference.groups, strict=True)
            ],
            weight_decay=0.3,
            **self.path,
        )
        lambdas = [group["weight_decay"] for group in self.reference.groups]
        for group in self.reference.groups:
            group["weight_decay"] = 0.3
        for s in self.states:
            s.update(fresh_state(s["m"]))
        self._constant_steps(adamw, steps, missing)
        for group, value in zip(self.reference.groups, lambdas, strict=True):
            group["weight_decay"] = value
        self.optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        self.reference.forget()

    def detach_and_attach(self, steps: int) -> None:
        """Remove a ScheduledWeightDecay, go on with the constant decay, attach another."""
        options = {key: self.groups[0][key] for key in OPTIONS}
        self.schedule.remove()
        for mine, group in zip(self.groups, self.reference.groups, strict=True):
            assert mine["weight_decay"] == group["weight_decay"], "remove() does not give the user's weight decay back"
        self._constant_steps(self.optimizer, steps, ())
        ScheduledWeightDecay(self.optimizer, **options)
        self.reference.forget()
