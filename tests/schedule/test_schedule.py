"""The schedule on optimizers other than AdamS."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from lockstep import HYPER, LockStep, OutOfMemory, assert_close, parameters
from reference_adams import ReferenceAdamS
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay
from hf_swd.core.wrappers import schedule_of


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of an interpolated momentum, decoupled decay, no second moment."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, momentum, beta1).sign())
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


MATRICES = ((5, 3), (4, 4), (2, 7))
ADAMW = {
    "adamw_foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw_forloop": functools.partial(torch.optim.AdamW, foreach=False),
    "adamw_fused": functools.partial(torch.optim.AdamW, fused=True),
    "adam_decoupled": functools.partial(torch.optim.Adam, decoupled_weight_decay=True),
}
if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:  # torch 2.6
    del ADAMW["adam_decoupled"]
# (optimizer, arguments of the schedule)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict]] = {
    **{name: (make, {}) for name, make in ADAMW.items()},
    "nadam": (functools.partial(torch.optim.NAdam, decoupled_weight_decay=True), {}),
    "radam": (functools.partial(torch.optim.RAdam, decoupled_weight_decay=True), {}),
    "lion": (Lion, {}),
    **({"muon": (torch.optim.Muon, {"beta2": 0.95})} if hasattr(torch.optim, "Muon") else {}),
    "adafactor": (torch.optim.Adafactor, {"beta2": 0.999}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def often_missing(i: int, step: int) -> bool:
    return i == 0 or (step + i) % 3 == 0


def never_missing(i: int, step: int) -> bool:
    return False


class Twins:
    """
    An optimizer under the schedule, its twin without, and the reference's schedule (whose weights do not matter here).

    The twin gets the reference's decay by hand before each step: the weights of both must agree.
    """

    def __init__(self, name: str, shapes=MATRICES, reference_steps: int = 0) -> None:
        self.make, self.schedule_kwargs = OPTIMIZERS[name]
        self.schedule_kwargs = {**self.schedule_kwargs, "reference_steps": reference_steps}
        self.params = parameters(shapes)
        self.twins = [Parameter(p.detach().clone()) for p in self.params]
        self.optimizer, self.twin = self.build(self.params), self.build(self.twins)
        self.schedule = ScheduledWeightDecay(self.optimizer, **self.schedule_kwargs)
        beta2 = self.schedule_kwargs.get("beta2") or self.optimizer.defaults["betas"][1]
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"]} for group in self.twin.param_groups
        ]
        # Of an optimizer whose moments are not Adam's, the number is its own: as of gradients before clipping.
        own_number = name in ("lion", "muon", "adafactor")
        self.reference = ReferenceAdamS(
            groups, betas=(0.9, beta2), lr=1e-3, reference_steps=reference_steps, unclipped_norm=own_number
        )
        self.steps = 0

    def build(self, params: list[Parameter]) -> torch.optim.Optimizer:
        return self.make(
            [{"params": params[:-1]}, {"params": params[-1:], "weight_decay": 0.2}], lr=1e-3, weight_decay=0.1
        )

    def set_gradients(self, missing=never_missing) -> None:
        self.steps += 1
        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            p.grad = None if missing(i, self.steps) else torch.randn_like(p) * 2 ** math.sin(self.steps)
            twin.grad = None if p.grad is None else p.grad.clone()

    def advance_twin(self) -> None:
        self.reference.step([[p.grad for p in self.twins[:-1]], [self.twins[-1].grad]])
        for group, expected in zip(self.twin.param_groups, self.reference.groups, strict=True):
            group["weight_decay"] = expected["decay"]
        self.twin.step()

    def compare(self) -> None:
        assert_close(self.schedule.grad_rms, self.reference.grad_rms, 1e-12, "grad_rms")
        assert self.schedule.step_count == self.reference.steps
        for group, expected in zip(self.optimizer.param_groups, self.reference.groups, strict=True):
            assert_close(group["weight_decay"], expected["decay"], 1e-12, "decay")
            assert group["initial_weight_decay"] == expected["weight_decay"]
        for p, twin in zip(self.params, self.twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-12, atol=1e-12)

    def run(self, steps: int, missing=never_missing) -> None:
        for _ in range(steps):
            self.set_gradients(missing)
            self.optimizer.step()
            self.advance_twin()
            self.compare()

    def resume(self, schedule_state: bool, schedule_first: bool = False) -> None:
        """Go on with a fresh optimizer and a fresh schedule, from state dicts that went through a file."""
        buffer = io.BytesIO()
        torch.save((self.optimizer.state_dict(), self.schedule.state_dict()), buffer)
        buffer.seek(0)
        optimizer_state, schedule_state_dict = torch.load(buffer, weights_only=True)
        self.params = [Parameter(p.detach().clone()) for p in self.params]
        self.optimizer = self.build(self.params)
        self.schedule = ScheduledWeightDecay(self.optimizer, **self.schedule_kwargs)
        if schedule_first:
            self.schedule.load_state_dict(schedule_state_dict)
        self.optimizer.load_state_dict(optimizer_state)
        if schedule_state and not schedule_first:
            self.schedule.load_state_dict(schedule_state_dict)


@pytest.mark.parametrize("missing", [never_missing, often_missing], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize("reference_steps", [0, 5], ids=lambda k: f"K{k}")
@every_optimizer
def test_weights_equal_those_of_a_twin_with_the_decay_set_by_hand(name, reference_steps, missing):
    Twins(name, reference_steps=reference_steps).run(20, missing)


@pytest.mark.parametrize("missing", [never_missing, often_missing], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize("reference_steps", [0, 5], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("make", ADAMW.values(), ids=ADAMW)
def test_adamw_with_the_schedule_is_adams(make, reference_steps, missing):
    pair = LockStep(reference_steps=reference_steps)
    params = [Parameter(p.detach().clone()) for p in pair.params]
    adamw = make(params, **HYPER)
    schedule = ScheduledWeightDecay(adamw, reference_steps=reference_steps)
    for _ in range(50):
        gradients = pair.gradients(missing)
        for p, g in zip(params, gradients[0], strict=True):
            p.grad = g
        adamw.step()
        pair.step(gradients)
        assert_close(schedule.grad_rms, pair.optimizer.grad_rms, 1e-14)
        for p, q in zip(params, pair.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@every_optimizer
def test_closure(name, keyword):
    twins = Twins(name)
    calls = []

    def closure():
        calls.append(1)
        twins.set_gradients()
        return torch.tensor(2.5)

    for _ in range(5):
        for p in twins.params:
            p.grad = torch.full_like(p, 100.0)  # stale: the closure brings the gradients that count
        loss = twins.optimizer.step(closure=closure) if keyword else twins.optimizer.step(closure)
        assert loss.item() == 2.5
        twins.advance_twin()
        twins.compare()

    assert len(calls) == 5


@every_optimizer
def test_zero_gradients_first_and_no_gradients(name):
    twins = Twins(name, reference_steps=4)
    for p in twins.params:
        p.grad = torch.zeros_like(p)
    for p in twins.twins:
        p.grad = torch.zeros_like(p)
    twins.optimizer.step()
    twins.advance_twin()
    twins.compare()
    twins.run(2)

    twins.optimizer.zero_grad()
    twins.optimizer.step()

    assert twins.schedule.step_count == 2  # since the first gradient that was not zero
    twins.run(5)


@pytest.mark.parametrize("unscale", [False, True], ids=["scaler_unscales", "unscaled_before"])
@pytest.mark.parametrize("reference_steps", [0, 3], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("name", ["adamw_fused", "adamw_foreach", "nadam", "lion"])
def test_grad_scaler_with_overflows(name, reference_steps, unscale):
    """A fused optimizer gets scaled gradients and is stepped even when they overflowed."""
    twins = Twins(name, reference_steps=reference_steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    scaler.scale(torch.zeros(()))
    for step in range(12):
        twins.set_gradients()
        overflow = step in (0, 4, 5)
        for p in twins.params:
            p.grad.mul_(math.inf if overflow else scaler.get_scale())
        if unscale:
            scaler.unscale_(twins.optimizer)
        scaler.step(twins.optimizer)
        scaler.update()
        if not overflow:
            twins.advance_twin()
            twins.compare()
        assert twins.schedule.step_count == twins.reference.steps


class TestState:
    @pytest.mark.parametrize("schedule_first", [False, True], ids=["optimizer_first", "schedule_first"])
    @pytest.mark.parametrize("missing", [never_missing, often_missing], ids=["all_gradients", "missing_gradients"])
    @pytest.mark.parametrize("reference_steps", [0, 3, 10], ids=lambda k: f"K{k}")
    @every_optimizer
    def test_of_schedule_and_optimizer_goes_on_exactly(self, name, reference_steps, missing, schedule_first):
        twins = Twins(name, reference_steps=reference_steps)
        twins.run(6, missing)
        twins.resume(schedule_state=True, schedule_first=schedule_first)
        twins.run(8, missing)

    @pytest.mark.parametrize("reference_steps", [0, 3, 10], ids=lambda k: f"K{k}")
    @every_optimizer
    def test_of_the_optimizer_alone_goes_on_exactly(self, name, reference_steps):
        """As a Trainer saves it, which knows nothing of the schedule."""
        twins = Twins(name, reference_steps=reference_steps)
        twins.run(6)
        twins.resume(schedule_state=False)
        twins.run(8)

    @pytest.mark.parametrize("name", ["adamw_fused", "nadam", "radam"])
    def test_of_the_optimizer_alone_with_missing_gradients(self, name):
        """Where a second moment and a step count are stored for each parameter."""
        twins = Twins(name)
        twins.run(6, often_missing)
        twins.resume(schedule_state=False)
        twins.run(8, often_missing)

    def test_assigned_lambda_survives(self):
        twins = Twins("adamw_fused")
        twins.run(3)
        twins.optimizer.param_groups[0]["weight_decay"] = twins.reference.groups[0]["weight_decay"] = 0.7
        twins.resume(schedule_state=True)
        twins.run(3)

    def test_attached_to_an_optimizer_that_has_taken_steps(self):
        """The moments of the past count, as in AdamS that takes over an AdamW."""
        p = Parameter(torch.randn(3, 3, dtype=torch.float64))
        adamw = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1)
        for _ in range(5):
            p.grad = torch.randn_like(p)
            adamw.step()
        schedule = ScheduledWeightDecay(adamw)
        p.grad = torch.randn_like(p)

        adamw.step()

        mean = adamw.state[p]["exp_avg_sq"].mean().item() / (1 - 0.999**6)
        assert schedule.grad_rms == pytest.approx(math.sqrt(mean), rel=1e-12)


class TestBeta2:
    def test_comes_from_betas_of_each_group(self):
        params = parameters(MATRICES)
        groups = [{"params": params[:1], "betas": (0.9, 0.5)}, {"params": params[1:], "betas": (0.8, 0.99)}]
        adamw = torch.optim.AdamW(groups, **HYPER)
        reference = ReferenceAdamS(groups, **HYPER)
        schedule = ScheduledWeightDecay(adamw)
        for _ in range(10):
            for p in params:
                p.grad = torch.randn_like(p)
            adamw.step()
            reference.step([[p.grad for p in params[:1]], [p.grad for p in params[1:]]])
            assert_close(schedule.grad_rms, reference.grad_rms, 1e-12)

    def test_given_overrides_betas(self):
        p = Parameter(torch.ones(3, dtype=torch.float64))
        adamw, reference = torch.optim.AdamW([p]), ReferenceAdamS([{"params": [p]}], betas=(0.9, 0.5))
        schedule = ScheduledWeightDecay(adamw, beta2=0.5)
        for _ in range(5):
            p.grad = torch.randn_like(p)
            adamw.step()
            reference.step([[p.grad]])
            assert_close(schedule.grad_rms, reference.grad_rms, 1e-12)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("Muon", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs Muon")),
            "Adafactor",
        ],
    )
    def test_is_required_where_there_are_no_betas(self, name):
        make = getattr(torch.optim, name)
        with pytest.raises(ValueError, match="beta2"):
            ScheduledWeightDecay(make([Parameter(torch.ones(2, 2))]))


L2_OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1),
    "Adam": lambda params: torch.optim.Adam(params, weight_decay=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, weight_decay=0.1),
    "RAdam": lambda params: torch.optim.RAdam(params, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, weight_decay=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, weight_decay=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, weight_decay=0.1),
    "Adamax": lambda params: torch.optim.Adamax(params, weight_decay=0.1),
    "ASGD": lambda params: torch.optim.ASGD(params, weight_decay=0.1),
}


class TestRefusals:
    @pytest.mark.parametrize("name", L2_OPTIMIZERS)
    def test_decay_that_is_not_decoupled(self, name):
        with pytest.raises((TypeError, ValueError), match=rf"(?s){name}.*decoupled|decoupled.*{name}"):
            ScheduledWeightDecay(L2_OPTIMIZERS[name]([Parameter(torch.ones(2))]), beta2=0.999)

    @pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.LBFGS])
    def test_optimizer_without_weight_decay(self, make):
        with pytest.raises((TypeError, ValueError), match="(?i)weight.decay"):
            ScheduledWeightDecay(make([Parameter(torch.ones(2))]), beta2=0.999)

    def test_second_schedule(self):
        adamw = torch.optim.AdamW([Parameter(torch.ones(2))])
        ScheduledWeightDecay(adamw)
        with pytest.raises((RuntimeError, ValueError), match="already"):
            ScheduledWeightDecay(adamw)

    def test_adams_which_has_a_schedule(self):
        with pytest.raises((RuntimeError, ValueError), match="already"):
            ScheduledWeightDecay(AdamS([Parameter(torch.ones(2))]))

    def test_refused_optimizer_is_left_alone(self):
        sgd = torch.optim.SGD([Parameter(torch.ones(2))], lr=0.1, weight_decay=0.1)
        before = copy.deepcopy(sgd.state_dict())
        with pytest.raises((TypeError, ValueError)):
            ScheduledWeightDecay(sgd, beta2=0.9)
        assert sgd.state_dict() == before
        assert not sgd._optimizer_step_pre_hooks
        assert schedule_of(sgd) is None


class TestRemove:
    def test_gives_back_the_users_decay_and_stops(self):
        twins = Twins("adamw_fused")
        twins.run(3)

        twins.schedule.remove()

        assert [group["weight_decay"] for group in twins.optimizer.param_groups] == [0.1, 0.2]
        assert not twins.optimizer._optimizer_step_pre_hooks
        assert schedule_of(twins.optimizer) is None
        twins.set_gradients()
        twins.optimizer.step()
        assert [group["weight_decay"] for group in twins.optimizer.param_groups] == [0.1, 0.2]

    def test_another_schedule_can_follow(self):
        twins = Twins("adamw_fused")
        twins.schedule.remove()
        twins.schedule = ScheduledWeightDecay(twins.optimizer)
        twins.run(3)

    def test_twice(self):
        adamw = torch.optim.AdamW([Parameter(torch.ones(2))])
        schedule = ScheduledWeightDecay(adamw)
        schedule.remove()
        schedule.remove()
        assert schedule_of(adamw) is None


def test_dropped_schedule_object_stays_in_force():
    """`ScheduledWeightDecay(optimizer)` without a name must work: people write it so."""
    p = Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([p], weight_decay=0.1)
    ScheduledWeightDecay(adamw)
    p.grad = torch.full_like(p, 0.5)

    adamw.step()

    assert adamw.param_groups[0]["weight_decay"] == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("attached", [False, True], ids=["AdamS", "attached"])
def test_dropped_optimizer_is_freed_at_once(attached):
    """No cycle of references: the moments of a dropped optimizer are too large to wait for the garbage collector."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([p]) if attached else AdamS([p])
    schedule = ScheduledWeightDecay(optimizer) if attached else optimizer.schedule
    optimizer.step()
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="no longer exists"):
        _ = schedule.step_count


class TestScheduleOf:
    def test_adams_and_attached_optimizers(self):
        adams, adamw = AdamS([Parameter(torch.ones(2))]), torch.optim.AdamW([Parameter(torch.ones(2))])
        assert schedule_of(adams) is adams.schedule
        assert schedule_of(adamw) is None
        schedule = ScheduledWeightDecay(adamw)
        assert schedule_of(adamw) is schedule

    def test_through_wrappers(self):
        class Wrapper:
            def __init__(self, optimizer):
                self.optimizer = optimizer

        adams = AdamS([Parameter(torch.ones(2))])
        assert schedule_of(Wrapper(Wrapper(adams))) is adams.schedule
        assert schedule_of(Wrapper(None)) is None


class CallsItsBase(torch.optim.AdamW):
    """torch calls the hooks of such a step twice, once anyone has built an AdamW."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.1, "unclipped_norm": True}],
    ids=["", "clipped", "unclipped-norm"],
)
@pytest.mark.parametrize("make", [CallsItsBase, "raises once"])
def test_gradients_of_a_step_are_taken_in_once(make, options):
    def trained(make):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = (make if isinstance(make, type) else torch.optim.AdamW)(layer.parameters(), weight_decay=0.1)
        ScheduledWeightDecay(optimizer, **options)
        decays = []
        for number in range(4):
            optimizer.zero_grad()
            layer(torch.randn(8, 4)).square().sum().backward()
            if make == "raises once" and number == 2:
                with OutOfMemory(optimizer, None), pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
            optimizer.step()
            decays.append(optimizer.param_groups[0]["weight_decay"])
        return decays, [p.detach() for p in layer.parameters()]

    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    decays, weights = trained(make)
    expected_decays, expected = trained(torch.optim.AdamW)
    assert decays == expected_decays and all(map(torch.equal, weights, expected))


def test_gradients_that_go_on_after_a_step_that_raised_are_measured_anew():
    def trained(raises):
        weight = Parameter(torch.ones(5))
        optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
        schedule = ScheduledWeightDecay(optimizer)
        for number in range(3):
            weight.grad = torch.full_like(weight, 0.5)
            if raises and number == 1:
                with OutOfMemory(optimizer, None), pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
            weight.grad += 1.0
            optimizer.step()
        return schedule.grad_rms

    assert trained(True) == trained(False)


def test_step_without_gradients_after_one_that_raised_is_none():
    weight = Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    schedule = ScheduledWeightDecay(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = torch.full_like(weight, 9.0)
    with OutOfMemory(optimizer, None), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert schedule.step_count == 1 and schedule.grad_rms == pytest.approx(1.0)


@pytest.mark.parametrize("first", ["hook", "schedule"])
def test_hooks_that_change_gradients_come_before_the_schedule(first):
    def clip(optimizer, *_):
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)

    weight = Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    if first == "hook":
        optimizer.register_step_pre_hook(clip)
    schedule = ScheduledWeightDecay(optimizer)
    if first == "schedule":
        optimizer.register_step_pre_hook(clip)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert schedule.grad_rms == pytest.approx(1e-3 / math.sqrt(5), rel=1e-2)
