"""What the schedule knows is one number in the parameter groups; Adam's moments are what it is read from.

So whatever happens to groups and state between two steps, the next decay is that of the state that is there; nothing
is held that would keep old tensors alive or a module from being moved. Single cases; `test_state_machine.py` draws
sequences of them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from lockstep import OutOfMemory, through_file
from reads import Reads
from reference_adams import rms_of_moments
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay


KERNELS = {"forloop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
MAX_NORM = 0.5
LR = 1e-2


class Scheduled:
    """An optimizer and its schedule; `kind` "adams", or a class of torch's Adam family with a ScheduledWeightDecay."""

    def __init__(self, kind="adams", params=None, dtype=torch.float64, path=None, weight_decay=1e-2, **options):
        if params is None:
            generator = torch.Generator().manual_seed(1)
            params = [
                Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
                for shape in ((4, 3), (5,), ())
            ]
        self.params = list(params)
        arguments = {"lr": LR, "weight_decay": weight_decay, **(path or {})}
        if kind == "adams":
            self.optimizer = AdamS(self.params, **arguments, **options)
            self.schedule = self.optimizer.schedule
        else:
            if kind in ("NAdam", "RAdam"):
                arguments = {"decoupled_weight_decay": True, **arguments}
            base = {key: options.pop(key) for key in ("amsgrad", "betas") if key in options}
            self.optimizer = getattr(torch.optim, kind)(self.params, **arguments, **base)
            self.schedule = ScheduledWeightDecay(self.optimizer, **options)

    @property
    def state(self):
        return self.optimizer.state

    @property
    def shown(self):
        return self.schedule.grad_rms, [float(group["weight_decay"]) for group in self.optimizer.param_groups]

    def give(self, seed, scale=None, missing=()):
        generator = torch.Generator().manual_seed(seed)
        scale = 0.1 * (1 + seed % 3) if scale is None else scale
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale
            p.grad = None if i in missing else grad

    def step(self, seed, **gradients):
        self.give(seed, **gradients)
        self.optimizer.step()

    def steps(self, first, last, **gradients):
        for seed in range(first, last):
            self.step(seed, **gradients)

    def check(self, rtol=1e-9):
        """After a step in which every parameter had a gradient."""
        assert self.schedule.grad_rms == pytest.approx(rms_of_moments(self.optimizer), rel=rtol)


adams_and_adamw = pytest.mark.parametrize("kind", ["adams", "AdamW"])
every_kind = pytest.mark.parametrize("kind", ["adams", "AdamW", "NAdam", "RAdam"])
every_kernel = pytest.mark.parametrize("path", KERNELS.values(), ids=KERNELS)


# Where the number stands


@adams_and_adamw
@pytest.mark.parametrize("options", [{}, {"unclipped_norm": True, "max_grad_norm": MAX_NORM}], ids=["", "unclipped"])
def test_groups_hold_the_number_and_states_nothing(kind, options):
    run, plain = Scheduled(kind, **options), Scheduled("AdamW", weight_decay=0.0)
    plain.schedule.remove()
    run.steps(0, 4)
    plain.steps(0, 4)
    own = {
        *("weight_decay", "initial_weight_decay", "scheduled_weight_decay", "reference_steps", "unclipped_norm"),
        *("max_grad_norm", "schedule_step", "second_moment_mean", "reference_rms"),
    }
    for groups in (run.optimizer.param_groups, run.optimizer.state_dict()["param_groups"]):
        assert set(groups[0]) - set(plain.optimizer.param_groups[0]) == own - {"weight_decay"}
        assert groups[0]["schedule_step"] == 4
        assert math.sqrt(groups[0]["second_moment_mean"]) == pytest.approx(run.schedule.grad_rms, rel=1e-12)
    for mine, its in zip(run.state.values(), plain.state.values(), strict=True):
        assert set(mine) == set(its)
    assert run.schedule.num_elements == sum(p.numel() for p in run.params)


@adams_and_adamw
@every_kernel
def test_state_dict_has_no_side_effect(kind, path):
    """Under DDP only one rank saves; here, right after a moment was edited in place, and without any reading due."""
    run = Scheduled(kind, path=path)
    run.steps(0, 3)
    run.state[run.params[0]]["exp_avg_sq"].mul_(4.0)
    twin = Scheduled(kind, copy.deepcopy(run.params), path=path)
    silent = copy.deepcopy(run.optimizer.state_dict())
    for each in (run, twin):
        each.optimizer.load_state_dict(copy.deepcopy(silent))
        each.step(3)
        each.state[each.params[1]]["exp_avg_sq"].mul_(0.25)
    for seed in range(4, 8):
        saved = run.optimizer.state_dict()
        assert saved["param_groups"][0]["second_moment_mean"] == run.schedule.grad_rms**2 or math.isclose(
            saved["param_groups"][0]["second_moment_mean"], run.schedule.grad_rms**2, rel_tol=1e-14
        )
        copy.deepcopy(saved)
        run.step(seed)
        twin.step(seed)
        assert run.shown == twin.shown
        assert all(map(torch.equal, run.params, twin.params))


@pytest.mark.parametrize("options", [{}, {"unclipped_norm": True, "max_grad_norm": 0.1}], ids=["", "unclipped"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("hook", ["pre", "post"])
@adams_and_adamw
def test_state_dict_in_a_step_hook_resumes_at_the_same_rms(kind, hook, order, options):
    """Of a hook that was there before the schedule's, or came after it."""
    saved = []

    def save(optimizer, *_):
        weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        saved.append((copy.deepcopy(optimizer.state_dict()), list(map(Parameter, weights))))

    run = Scheduled(kind, **options)
    if kind != "adams" and order == "before":
        run.schedule.remove()
        getattr(run.optimizer, f"register_step_{hook}_hook")(save)
        run.schedule = ScheduledWeightDecay(run.optimizer, **options)
    else:
        getattr(run.optimizer, f"register_step_{hook}_hook")(save)
    rms = []
    for seed in range(6):
        run.step(seed)
        rms.append(run.schedule.grad_rms)
    assert len(saved) == 6
    for number, (state_dict, weights) in enumerate(saved):
        resumed = Scheduled(kind, weights)
        resumed.optimizer.load_state_dict(state_dict)
        for seed in range(number + (hook == "post"), 6):
            resumed.step(seed)
            assert resumed.schedule.grad_rms == pytest.approx(rms[seed], rel=1e-9), (number, seed)
            assert resumed.schedule.step_count == seed + 1


# Edits of the moments


def clones(run):
    for state in run.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def there_and_back(run):
    """A move to another device makes new tensors both ways, and frees the ones before."""
    for state in run.state.values():
        for key in list(state):
            kept = copy.deepcopy(state.pop(key)).numpy()
            state[key] = torch.tensor(kept)


def scaled_there_and_back(run):
    """Those that come back are where those that went were: each has the `id` of the one before."""
    others = [torch.empty(0) for _ in range(10_000)]  # there is hardly another place
    for state in run.state.values():
        value = state["exp_avg_sq"] * 4.0
        before = id(state.pop("exp_avg_sq"))
        while id(new := value.clone()) != before:
            others.append(new)
            assert len(others) < 300_000
        state["exp_avg_sq"] = new


def other_moments(run):
    for state in run.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"] * 4.0


def other_moments_twice(run):
    other_moments(run)
    other_moments(run)


def popped(run):
    run.state.pop(run.params[0])


def cleared(run):
    run.state.clear()


EDITS = [
    clones,
    there_and_back,
    scaled_there_and_back,
    other_moments,
    other_moments_twice,
    popped,
    cleared,
]


@every_kind
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_next_step_has_the_rms_of_the_state_that_is_there(kind, edit):
    run = Scheduled(kind)
    for seed in range(4, 16, 2):
        run.step(seed)
        edit(run)
        run.step(seed + 1)
        run.check()


@adams_and_adamw
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_step_that_is_skipped_leaves_what_it_has_read(kind, edit):
    """The one after it need not read."""
    run = Scheduled(kind, path={"fused": True})
    run.steps(0, 4)
    edit(run)
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    run.steps(4, 6, scale=math.inf)
    del run.optimizer.grad_scale, run.optimizer.found_inf
    run.steps(6, 8)
    run.check()


@every_kind
def test_step_counts_changed_in_place_count_after_refresh(kind):
    run = Scheduled(kind)
    run.steps(0, 4)
    run.state[run.params[0]]["step"].fill_(40)
    run.schedule.refresh()
    run.steps(4, 6)
    run.check()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_in_place_edit_counts_after_refresh(path, dtype):
    if dtype.is_complex and path.get("fused"):
        pytest.skip("torch has no fused kernel for complex numbers")
    run = Scheduled(dtype=dtype, path=path)
    run.steps(0, 4)
    run.state[run.params[0]]["exp_avg_sq"].mul_(4.0)
    run.schedule.refresh()
    run.step(4)
    run.check({torch.float64: 1e-9, torch.bfloat16: 0.02}.get(dtype, 1e-5))


@every_kind
def test_in_place_edit_counts_within_a_hundred_steps(kind):
    run = Scheduled(kind)
    run.step(0)
    run.state[run.params[0]]["exp_avg_sq"].mul_(100.0)
    run.steps(1, 101)
    run.check()


def moments_are_read(run, seed):
    """Whether a step reads the moments, other than in Adam's kernel."""
    with Reads(run.state[run.params[0]]["exp_avg_sq"]) as reads:
        run.step(seed)
    assert reads.times.pop("_fused_adamw_", 0) == 1
    return reads.times.total() > 0


@adams_and_adamw
def test_moments_are_read_in_every_hundredth_step_that_is_tried(kind):
    """Whether it is skipped (overflow), of the schedule or not (zeros at first)."""
    run = Scheduled(kind, path={"fused": True})
    run.steps(0, 3, scale=0.0)
    read = [seed for seed in range(3, 50) if moments_are_read(run, seed)]
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    run.steps(50, 60)
    del run.optimizer.grad_scale, run.optimizer.found_inf
    read += [seed for seed in range(60, 205) if moments_are_read(run, seed)]
    assert read == [100, 200]
    assert run.schedule.step_count == 205 - 3 - 10


@adams_and_adamw
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_reading_replaces_what_differs_by_more_than_rounding(kind, dtype, tolerance):
    for difference in (tolerance / 10, 10 * tolerance):
        run, twin = Scheduled(kind, dtype=dtype), Scheduled(kind, dtype=dtype)
        run.steps(0, 4)
        twin.steps(0, 4)
        for state in run.state.values():
            state["exp_avg_sq"].mul_(1 + difference)
        run.schedule.refresh()
        run.step(4)
        twin.step(4)
        if difference < tolerance:
            assert run.shown == twin.shown
        else:
            run.check(tolerance / 10)
            assert run.schedule.grad_rms > twin.schedule.grad_rms * (1 + tolerance)


def test_in_place_edit_counts_when_the_set_changes():
    run = Scheduled()
    run.steps(0, 10)
    run.state[run.params[1]]["exp_avg_sq"].mul_(100.0)
    run.step(10, missing={0})
    run.step(11)
    run.check()


@adams_and_adamw
def test_refresh_changes_nothing_where_nothing_was_edited(kind):
    """A reading that agrees leaves the number as it is, to the last bit."""
    run, twin = Scheduled(kind), Scheduled(kind)
    for seed in range(30):
        run.schedule.refresh()
        run.step(seed)
        twin.step(seed)
        assert run.shown == twin.shown
        assert all(map(torch.equal, run.params, twin.params))


@adams_and_adamw
def test_reading_again_and_again_does_not_drift(kind):
    run = Scheduled(kind, dtype=torch.float32)
    for seed in range(250):
        run.step(seed)
        run.check(1e-5)


@pytest.mark.parametrize("kind", ["adams", "AdamW"])
@pytest.mark.parametrize("edit", [clones, there_and_back, other_moments, cleared], ids=lambda edit: edit.__name__)
def test_unclipped_norm_does_not_follow_the_moments(kind, edit):
    """They are of clipped gradients; the number is its own truth."""
    options = {"unclipped_norm": True, "max_grad_norm": 0.01}
    run, twin = Scheduled(kind, **options), Scheduled(kind, **options)
    run.steps(0, 4)
    twin.steps(0, 4)
    edit(run)
    run.step(4)
    twin.step(4)
    assert run.schedule.grad_rms == twin.schedule.grad_rms > 2 * rms_of_moments(twin.optimizer)


def test_beta2_of_the_schedule_does_not_follow_the_moments():
    run, twin = Scheduled("AdamW", beta2=0.9), Scheduled("AdamW", beta2=0.9)
    run.steps(0, 4)
    twin.steps(0, 4)
    other_moments(run)
    run.step(4)
    twin.step(4)
    assert run.schedule.grad_rms == twin.schedule.grad_rms


class ScaledMoments(torch.optim.Optimizer):
    """Keeps under Adam's name what is not Adam's: as Prodigy does, whose moments are scaled by its own step size."""

    def __init__(self, params, lr=LR, betas=(0.9, 0.99), weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                    v.mul_(group["betas"][1]).addcmul_(p.grad, p.grad, value=7.0)
                    p.mul_(1 - group["lr"] * group["weight_decay"])


@pytest.mark.parametrize("kind", ["scaled moments", "unclipped_norm", "beta2"])
def test_number_of_its_own_is_the_moving_average_of_squared_norms(kind):
    """Over the steps, parameters that are frozen for a while, and a resume: the mean goes on, whatever it was over."""

    def build(params):
        if kind == "scaled moments":
            run = Scheduled("adams", params)
            run.optimizer = ScaledMoments(run.params)
            run.schedule = ScheduledWeightDecay(run.optimizer)
            return run
        options = {"unclipped_norm": True, "max_grad_norm": math.inf} if kind == "unclipped_norm" else {"beta2": 0.99}
        return Scheduled("AdamW", params, **options)

    run = build(Scheduled().params)
    beta2 = run.optimizer.param_groups[0]["betas"][1] if kind == "unclipped_norm" else 0.99
    mean, decays = 0.0, []
    for seed in range(12):
        missing = {0} if 4 <= seed < 7 else ()
        run.step(seed, missing=missing)
        grads = [p.grad for p in run.params if p.grad is not None]
        squared_norm, count = sum(g.square().sum().item() for g in grads), sum(g.numel() for g in grads)
        mean = beta2 * mean + (1 - beta2) * squared_norm / count
        expected = math.sqrt(mean / (1 - beta2 ** (seed + 1)))
        assert run.schedule.grad_rms == pytest.approx(expected, rel=1e-9), seed
        decays.append(run.optimizer.param_groups[0]["weight_decay"])
        assert decays[-1] == pytest.approx(1e-2 / expected, rel=1e-9)
        if seed == 8:
            state_dict = copy.deepcopy(run.optimizer.state_dict())
            run = build(copy.deepcopy(run.params))
            run.optimizer.load_state_dict(state_dict)


# A step that raises


@adams_and_adamw
@every_kernel
@pytest.mark.parametrize("options", [{}, {"reference_steps": 5}, {"unclipped_norm": True, "max_grad_norm": 0.2}])
@pytest.mark.parametrize("after", [0, 4])
def test_step_that_raised_and_is_repeated_counts_once(kind, path, options, after):
    run, twin = Scheduled(kind, path=path, **options), Scheduled(kind, path=path, **options)
    run.steps(0, after)
    twin.steps(0, after)
    run.give(after)
    weights = [p.detach().clone() for p in run.params]
    before = {key: value for key, value in run.optimizer.state_dict()["param_groups"][0].items() if key != "params"}
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(run.optimizer):
        run.optimizer.step()
    left = run.optimizer.state_dict()["param_groups"][0]
    for key in ("schedule_step", "second_moment_mean", "reference_rms", "weight_decay"):
        assert left[key] == before[key], key
    assert all(map(torch.equal, run.params, weights))

    for seed in range(after, after + 4):
        run.step(seed)
        twin.step(seed)
        assert run.shown == (pytest.approx(twin.shown[0], rel=1e-9), pytest.approx(twin.shown[1], rel=1e-9))
        assert run.schedule.step_count == twin.schedule.step_count == seed + 1
    for p, q in zip(run.params, twin.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@adams_and_adamw
def test_after_a_kernel_that_raised_halfway_the_moments_are_the_truth(kind):
    """torch has counted Adam's steps by then; what the repeated step makes of them is what the schedule follows."""
    run = Scheduled(kind, path={"fused": True})
    run.steps(0, 4)
    run.give(4)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(run.optimizer, "_fused_adamw_"):
        run.optimizer.step()
    run.steps(4, 6)
    run.check()
    assert run.schedule.step_count == 6


# Nothing is held


class Freed:
    """The moments that a run has now, and whether they are alive after the block."""

    def __init__(self, run):
        self.references = [
            weakref.ref(value) for state in run.state.values() for key, value in state.items() if key != "step"
        ]

    def check(self):
        gc.collect()
        assert self.references and not any(reference() is not None for reference in self.references)


@adams_and_adamw
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("way", ["clear", "offload", "load_state_dict", "replace parameters"])
def test_old_moments_are_freed_at_once(kind, way, clip):
    run = Scheduled(kind)
    run.steps(0, 3)
    if clip:
        run.give(3)
        run.schedule.clip_grad_norm_(0.1)
    state_dict = copy.deepcopy(run.optimizer.state_dict())
    freed = Freed(run)
    if way == "clear":
        run.state.clear()
    elif way == "offload":
        for state in run.state.values():
            state.update({key: value.numpy() for key, value in copy.deepcopy(state).items()})
    elif way == "load_state_dict":
        run.optimizer.load_state_dict(state_dict)
    else:
        run.state.clear()
        run.optimizer.param_groups[0]["params"] = [Parameter(p.detach().clone()) for p in run.params]
        run.params = run.optimizer.param_groups[0]["params"]
    freed.check()


@adams_and_adamw
def test_gradients_are_freed_after_clipping_and_after_the_step(kind):
    run = Scheduled(kind)
    for clip in (False, True):
        run.give(0)
        if clip:
            run.schedule.clip_grad_norm_(0.1)
        else:
            run.optimizer.step()
        references = [weakref.ref(p.grad) for p in run.params]
        run.optimizer.zero_grad()
        gc.collect()
        assert not any(reference() is not None for reference in references)


@adams_and_adamw
def test_parameters_are_freed_with_model_and_optimizer(kind):
    run = Scheduled(kind)
    run.steps(0, 2)
    references = [weakref.ref(p) for p in run.params]
    del run
    gc.collect()
    assert not any(reference() is not None for reference in references)


@adams_and_adamw
def test_parameters_that_others_replace_are_freed(kind):
    run = Scheduled(kind)
    run.steps(0, 2)
    run.schedule.clip_grad_norm_(0.1)
    references = [weakref.ref(p) for p in run.params]
    run.state.clear()
    run.optimizer.param_groups[0]["params"] = run.params = [Parameter(torch.ones(3))]
    gc.collect()
    assert not any(reference() is not None for reference in references)


@contextlib.contextmanager
def swap_on_conversion():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


MOVES = {
    "cpu": lambda model: model.cpu(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to_empty": lambda model: model.to_empty(device="cpu"),
}


@adams_and_adamw
@pytest.mark.parametrize("stepped", [False, True], ids=["built", "stepped"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_module_may_be_converted_by_swapping_its_parameters(kind, move, stepped):
    """As torch does with DTensors, with FSDP2 and tensor subclasses, and everywhere if it is asked to."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    run = Scheduled(kind, model.parameters())
    if stepped:
        run.steps(0, 3)
        run.schedule.clip_grad_norm_(1.0)
    run.optimizer.zero_grad()
    with swap_on_conversion():
        move(model)
    torch.nn.init.ones_(model[0].weight)
    if model[0].weight.dtype == torch.float32:
        run.steps(3, 6)
        run.check(1e-5)


@adams_and_adamw
@pytest.mark.parametrize("begin", [0, 2], ids=["from-the-begin", "later"])
def test_steps_in_inference_mode(kind, begin):
    run, twin = Scheduled(kind, path={"fused": True}), Scheduled(kind, path={"fused": True})
    for seed in range(6):
        with torch.inference_mode(seed >= begin):
            run.step(seed)
            norm = run.schedule.clip_grad_norm_(0.1)
        twin.step(seed)
        assert norm == twin.schedule.clip_grad_norm_(0.1)
        assert run.shown == twin.shown
    assert all(map(torch.equal, run.params, twin.params))


@adams_and_adamw
def test_steps_outside_and_inside_inference_mode_by_turns(kind):
    run, twin = Scheduled(kind), Scheduled(kind)
    for seed in range(6):
        if seed == 3:  # numbers that are loaded become tensors in the step
            for each in (run, twin):
                each.optimizer.load_state_dict(each.optimizer.state_dict())
        with torch.inference_mode(seed % 2 == 1):
            run.give(seed)
            run.optimizer.step()
        twin.step(seed)
        assert run.shown == twin.shown
        assert run.optimizer.state_dict()["param_groups"] == twin.optimizer.state_dict()["param_groups"]


@adams_and_adamw
@every_kernel
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": MAX_NORM}, {"amsgrad": True}], ids=str)
def test_steps_under_another_default_device(kind, path, options):
    """As in a loop that builds parts of a model on the meta device."""
    run, twin = Scheduled(kind, path=path, **options), Scheduled(kind, path=path, **options)
    run.step(0)
    twin.step(0)
    for seed in range(1, 5):
        missing = {1} if seed == 3 else ()
        run.give(seed, missing=missing)
        with torch.device("meta"):
            norm = run.schedule.clip_grad_norm_(0.4)
            run.optimizer.step()
            run.optimizer.load_state_dict(run.optimizer.state_dict())
        twin.give(seed, missing=missing)
        assert norm == twin.schedule.clip_grad_norm_(0.4)
        twin.optimizer.step()
        assert run.shown == twin.shown
    with torch.device("meta"):
        run.optimizer.add_param_group({"params": [Parameter(torch.ones(3, device="cpu"))]})
    assert all(map(torch.equal, run.params, twin.params))


def test_first_step_under_another_default_device():
    run, twin = Scheduled(), Scheduled()
    run.give(0)
    with torch.device("meta"):
        run.optimizer.step()
    twin.step(0)
    assert run.shown == twin.shown


# Checkpoints of others, and foreign optimizers


@pytest.mark.parametrize("strict", [True, False])
def test_flat_checkpoint_of_adamw(strict):
    """torch.distributed.checkpoint's form in which every entry has a key of its own: torch asks for a key of every
    entry of the groups, and says which is missing, before anyone else sees it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    adamw = Scheduled("AdamW", model.parameters())
    adamw.schedule.remove()
    adamw.steps(0, 4)
    options = StateDictOptions(flatten_optimizer_state_dict=True, strict=strict)
    flat = get_optimizer_state_dict(model, adamw.optimizer, options=options)

    run = Scheduled("adams", model.parameters(), weight_decay=0.05, reference_steps=7)
    shown, weights = run.optimizer.state_dict()["param_groups"], [p.detach().clone() for p in run.params]
    with pytest.raises(KeyError, match="param_groups"):
        set_optimizer_state_dict(model, run.optimizer, flat, options=options)
    assert run.optimizer.state_dict()["param_groups"] == shown and not any(run.state.values())
    assert all(map(torch.equal, run.params, weights))

    # The form that the documents name instead.
    options = StateDictOptions(strict=strict)
    whole = get_optimizer_state_dict(model, adamw.optimizer, options=options)
    set_optimizer_state_dict(model, run.optimizer, whole, options=options)
    assert run.optimizer.param_groups[0]["initial_weight_decay"] == 0.05 and run.schedule.reference_steps == 7
    run.step(4)
    run.check()
    assert run.schedule.step_count == 5


def test_optimizer_that_is_its_own_optimizer_does_not_hang():
    code = """
        import torch, hf_swd

        class Own(torch.optim.AdamW):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.optimizer = self

        class Wrapper:
            pass

        hf_swd.AdamS([torch.ones(2)])  # with it comes the hook that looks at every optimizer
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = Own([p], lr=0.1, weight_decay=0.5)
        optimizer.step()
        assert torch.allclose(p, torch.full((2,), 0.85))

        first, second = Wrapper(), Wrapper()
        first.optimizer, second.optimizer = second, first
        for function, wrapper in ((hf_swd.attach, optimizer), (hf_swd.attach, first)):
            try:
                function(wrapper)
            except ValueError as error:
                assert "no weight decay schedule" in str(error)
            else:
                raise AssertionError("no error")
        try:
            hf_swd.ScheduledWeightDecay(first)
        except TypeError:
            pass
        else:
            raise AssertionError("no error")

        schedule = hf_swd.ScheduledWeightDecay(optimizer)
        optimizer.step()
        assert abs(schedule.grad_rms - 1) < 1e-6 and hf_swd.attach(optimizer) is schedule
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


@adams_and_adamw
def test_plain_values_in_the_state_are_left_alone(kind):
    run = Scheduled(kind)
    run.state["note"] = 3
    run.steps(0, 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = Scheduled(kind, copy.deepcopy(run.params))
    other.optimizer.load_state_dict(saved)
    run.step(2)
    other.step(2)
    assert run.shown == other.shown
    assert run.state["note"] == other.state["note"] == 3
    if kind != "adams":
        run.schedule.remove()
        assert run.state["note"] == 3


# Checkpoints of 0.1.0


def of_0_1_0(run, own_sums=None):
    """A checkpoint as 0.1.0 wrote it: sums and steps beside the moments, the number of elements in the groups."""
    state_dict = copy.deepcopy(run.optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["num_elements"] = float(sum(p.numel() for p in run.params))
        del group["max_grad_norm"]
    for state in state_dict["state"].values():
        step = float(state["step"])
        mean = state_dict["param_groups"][0]["second_moment_mean"]
        read = state["exp_avg_sq"].double().sum().item()
        own = mean * state["exp_avg_sq"].numel() * (1 - 0.999**step)
        state.update(second_moment_sum=own if run.schedule.unclipped_norm else read, second_moment_step=step)
    return through_file(state_dict)


@adams_and_adamw
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reference_steps", [0, 3, 9])
def test_checkpoint_of_0_1_0_goes_on(kind, dtype, reference_steps):
    run = Scheduled(kind, dtype=dtype, reference_steps=reference_steps)
    run.steps(0, 5)
    old = of_0_1_0(run)
    resumed = Scheduled(kind, copy.deepcopy(run.params))
    resumed.optimizer.load_state_dict(old)
    assert resumed.shown == run.shown and resumed.schedule.step_count == 5
    for seed in range(5, 12):
        run.step(seed)
        resumed.step(seed)
        assert resumed.shown == run.shown
    for state in resumed.state.values():
        assert not {"second_moment_sum", "second_moment_step"} & set(state)
    assert "num_elements" not in resumed.optimizer.param_groups[0]
    assert all(map(torch.equal, run.params, resumed.params))


@adams_and_adamw
def test_checkpoint_of_0_1_0_with_unclipped_norm_goes_on(kind):
    options = {"unclipped_norm": True, "max_grad_norm": 0.05}
    run = Scheduled(kind, **options)
    run.steps(0, 5)
    resumed = Scheduled(kind, copy.deepcopy(run.params), **options)
    resumed.optimizer.load_state_dict(of_0_1_0(run))
    assert resumed.schedule.unclipped_norm and resumed.schedule.max_grad_norm == 0.05
    for seed in range(5, 9):
        run.step(seed)
        resumed.step(seed)
        assert resumed.shown == run.shown
