"""The judge of the schedule's state: random sequences of whatever can happen to an optimizer between its steps.

After every step the effective decay of each group, grad_rms, the step count and the weights are those of the
reference, which is in float64, takes every mean over all elements, and keeps its moments parameter by parameter. Only
moments that were edited in place may count later: from the next time that the schedule reads them.
`tests/support/lockstep.py` says what each operation is; here are the sequences. The long run
(marker `slow`; HF_SWD_STATE_MACHINE_EXAMPLES sets its length) draws new ones each time.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from lockstep import LockStep
from torch.nn import Parameter


KERNELS = {"forloop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SHAPES = ((4, 3), (5,), (), (2, 2), (0,))
MAX_PARAMS = 6

# dtypes of the parameters, and the kernels that take them
FAMILIES = {
    "float64": ([torch.float64], list(KERNELS)),
    "float32": ([torch.float32], list(KERNELS)),
    "complex": ([torch.float64, torch.complex128], ["forloop", "foreach"]),
    "complex64": ([torch.complex64, torch.float32], ["forloop", "foreach"]),
    "bfloat16": ([torch.bfloat16], list(KERNELS)),
    "float16": ([torch.float16], list(KERNELS)),
}
BETAS = ((0.9, 0.999), (0.9, 0.99), (0.8, 0.9), (0.0, 0.5))
RATES = (1e-2, 1e-3, 0.1, 0.0)
DECAYS = (1e-2, 0.1, 1e-3, 0.0, 5.0)  # the last exceeds 1/lr now and then

CHANGES = {
    "in place": lambda p: p.grad.mul_(1.5),
    "replaced": lambda p: setattr(p, "grad", p.grad * 1.5),
    "data": lambda p: p.grad.data.mul_(0.0),
    "other data": lambda p: setattr(p.grad, "data", p.grad.data * 1.5),
    "numpy": lambda p: p.grad.numpy().fill(0.0) if p.dtype is not torch.bfloat16 else p.grad.zero_(),
    "dropped": lambda p: setattr(p, "grad", None),
}
MODES = {
    "": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
}

CLIPPINGS = [
    *({"unclipped_norm": False, "max_grad_norm": norm} for norm in (0.0, 0.0, 0.5, math.inf)),
    *({"unclipped_norm": True, "max_grad_norm": norm} for norm in (0.5, math.inf)),
]

numbers = st.integers(0, 1 << 16)
few = st.integers(0, 5)
positions = st.sets(st.integers(0, MAX_PARAMS - 1), max_size=3)


class StateMachine(RuleBasedStateMachine):
    @initialize(
        data=st.data(),
        family=st.sampled_from(sorted(FAMILIES)),
        owner=st.sampled_from(["adams", "adams", "adamw"]),
        amsgrad=st.sampled_from([False, False, True]),
        maximize=st.booleans(),
        reference_steps=st.sampled_from([0, 1, 3]),
        clipping=st.sampled_from(CLIPPINGS),
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        seed=numbers,
    )
    def build(self, data, family, owner, amsgrad, maximize, reference_steps, clipping, sizes, seed):
        torch.manual_seed(seed)
        self.dtypes, kernels = FAMILIES[family]
        self.kernels = [KERNELS[name] for name in kernels]
        betas = data.draw(st.sampled_from(BETAS))
        groups = [
            {
                "params": [self.new_param(i) for i in range(size)],
                "lr": data.draw(st.sampled_from(RATES[:3])),
                # What the mean before clipping is with more than one beta2 is nobody's business.
                "betas": betas if clipping["unclipped_norm"] else data.draw(st.sampled_from(BETAS)),
                "weight_decay": data.draw(st.sampled_from(DECAYS)),
            }
            for size in sizes
        ]
        rtol = 1e-9 if family in ("float64", "complex") else 1e-5
        self.run = LockStep(
            groups,
            owner=owner,
            path=data.draw(st.sampled_from(self.kernels)),
            rtol=math.inf if family in ("bfloat16", "float16") else rtol,
            rms_rtol=rtol,
            reference_steps=reference_steps,
            amsgrad=amsgrad,
            maximize=maximize,
            **clipping,
        )
        self.saved, self.kept = [], []

    def new_param(self, number: int) -> Parameter:
        dtype = self.dtypes[number // len(SHAPES) % len(self.dtypes)]
        return Parameter(
            torch.randn(SHAPES[number % len(SHAPES)], dtype=torch.complex128 if dtype.is_complex else None).to(dtype)
        )

    def pick(self, number: int) -> Parameter:
        return self.run.params[number % len(self.run.params)]

    def pick_group(self, number: int) -> int:
        return number % len(self.run.groups)

    def all_but_one(self, missing: set[int]) -> set[int]:
        """Without the first position that has elements: AdamW's moments are not all zero (which step would be
        theirs?)."""
        with_elements = [i for i, p in enumerate(self.run.params) if p.numel()]
        assume(with_elements)
        return missing - {with_elements[0]}

    # Steps

    @rule(scale=st.sampled_from([0.1, 1.0, 10.0, 0.0]), missing=positions, zero=positions)
    def give(self, scale, missing, zero):
        """New gradients; whatever comes now comes between backward and step."""
        gradients = self.run.gradients(lambda i, step: i in missing, scale=scale, zero=zero)
        self.run.set_gradients(gradients)

    @rule(max_norm=st.sampled_from([0.5, 2.0, math.inf]))
    def clip(self, max_norm):
        self.run.clip(max_norm)

    @rule(number=numbers, change=st.sampled_from(sorted(CHANGES)))
    def change_a_gradient(self, number, change):
        with_gradient = [p for p in self.run.params if p.grad is not None and p.numel()]
        assume(with_gradient)
        CHANGES[change](with_gradient[number % len(with_gradient)])

    @rule(closure=st.booleans(), mode=st.sampled_from(["", "", *MODES]))
    def step(self, closure, mode):
        if not all(p.grad is None or self.run.optimizer.state.get(p) for p in self.run.params):
            mode = ""  # of what AdamW would make in its first step, it could not do the next
        step = self.run.optimizer.step
        with MODES[mode]():
            self.run.step_with_what_is_there((lambda: step(lambda: 0.0)) if closure else step)
        for p in self.run.params:
            p.grad = None

    @rule(count=st.integers(1, 4), scale=st.sampled_from([0.1, 1.0, 0.01]), missing=positions, zero=positions)
    def steps(self, count, scale, missing, zero):
        for _ in range(count):
            self.give(scale, missing, zero)
            self.step(False, "")

    @rule(missing=positions)
    def step_that_raises_and_is_repeated(self, missing):
        self.give(0.1, missing, ())
        self.run.step_that_raises()
        self.step(False, "")

    @precondition(lambda self: all(group["fused"] for group in self.run.groups))  # a new one has another kernel
    @rule(missing=positions)
    def overflow(self, missing):
        """A step that a GradScaler leaves out: torch's fused kernels are told so."""
        self.give(0.1, missing, ())
        self.run.overflow()

    # Groups

    @rule(number=few, value=st.sampled_from(DECAYS))
    def assign_weight_decay(self, number, value):
        self.run.set(self.pick_group(number), "weight_decay", value)

    @rule(number=few, value=st.sampled_from(RATES))
    def assign_lr(self, number, value):
        self.run.set(self.pick_group(number), "lr", value)

    @rule(number=few, value=st.sampled_from(BETAS))
    def assign_betas(self, number, value):
        everywhere = self.run.reference.unclipped_norm
        for index in range(len(self.run.groups)) if everywhere else [self.pick_group(number)]:
            self.run.set(index, "betas", value)

    @rule(value=st.sampled_from([0.5, 2.0, math.inf, 0.0]))
    def assign_max_grad_norm(self, value):
        self.run.set_max_grad_norm(value or (math.inf if self.run.reference.unclipped_norm else 0.0))

    @rule(index=few)
    def other_kernels(self, index):
        self.run.set_path(self.kernels[index % len(self.kernels)])

    @precondition(lambda self: len(self.run.params) < MAX_PARAMS)
    @rule(number=numbers, decay=st.sampled_from(DECAYS), beta=st.sampled_from(BETAS), amount=st.integers(1, 2))
    def add_group(self, number, decay, beta, amount):
        # A group takes amsgrad and the like from the constructor's arguments, which are those of this run.
        betas = self.run.groups[0]["betas"] if self.run.reference.unclipped_norm else beta
        self.run.add_group(
            {"weight_decay": decay, "betas": betas, "params": [self.new_param(number + i) for i in range(amount)]}
        )

    @precondition(lambda self: len(self.run.params) < MAX_PARAMS)
    @rule(number=numbers, group=few)
    def add_param(self, number, group):
        self.run.add_param(self.pick_group(group), self.new_param(number))

    @rule(number=numbers, group=few)
    def move(self, number, group):
        self.run.move(self.pick(number), self.pick_group(group))

    @rule(number=numbers, shape=few, keep_state=st.booleans())
    def replace(self, number, shape, keep_state):
        old = self.pick(number)
        new = Parameter(old.detach().clone()) if keep_state else self.new_param(shape)
        self.run.replace(old, new, keep_state=keep_state)

    @rule(number=numbers)
    def swap(self, number):
        self.run.swap(self.pick(number))

    @precondition(lambda self: len(self.run.params) > 1)
    @rule(number=numbers)
    def take_out(self, number):
        self.kept.append(self.run.take_out(self.pick(number)))

    @precondition(lambda self: self.kept and len(self.run.params) < MAX_PARAMS)
    @rule(group=few)
    def put_back(self, group):
        self.run.put_back(self.pick_group(group), self.kept.pop())

    @precondition(lambda self: len(self.run.groups) > 1)
    @rule(group=few)
    def remove_group(self, group):
        index = self.pick_group(group)
        assume(len(self.run.params) > len(self.run.groups[index]["params"]))
        self.run.remove_group(index)

    @rule()
    def clear_groups_and_add_them_anew(self):
        assume(all(group["params"] for group in self.run.groups))
        self.run.clear_groups_and_add_them_anew()

    # State

    @rule(number=numbers)
    def pop_state(self, number):
        self.run.pop_state(self.pick(number))

    @rule()
    def clear_state(self):
        self.run.clear_state()

    @rule(
        number=numbers,
        factor=st.sampled_from([0.25, 4.0]),
        how=st.sampled_from(["in place", "in place", "replaced", "there and back"]),
        refresh=st.booleans(),
    )
    def scale_state(self, number, factor, how, refresh):
        self.run.scale_state(self.pick(number), factor, how=how)
        if refresh:
            self.run.refresh()

    @rule()
    def offload(self):
        self.run.offload()

    @rule()
    def refresh(self):
        self.run.refresh()

    @rule(number=numbers, step=st.integers(1, 20))
    def set_step(self, number, step):
        self.run.set_step(self.pick(number), step)

    @rule()
    def plain_value(self):
        self.run.optimizer.state["note"] = {"of": "mine"}

    # Copies and checkpoints

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, way):
        self.run.copied(way)
        self.kept = []

    @rule(through=st.sampled_from(["deepcopy", "file"]))
    def save(self, through):
        self.saved = [*self.saved[-2:], self.run.save(through)]

    @rule()
    def state_dict_of_which_nothing_is_used(self):
        self.run.optimizer.state_dict()

    @precondition(lambda self: self.saved)
    @rule(index=few, weights=st.booleans())
    def load(self, index, weights):
        self.run.load(self.saved[index % len(self.saved)], weights=weights)

    @precondition(lambda self: self.saved)
    @rule(index=few)
    def load_into_a_fresh_one(self, index):
        self.run.load(self.saved[index % len(self.saved)], fresh=True)
        self.kept = []

    @precondition(lambda self: self.saved)
    @rule(
        index=few,
        lr=st.sampled_from(RATES),
        weight_decay=st.sampled_from(DECAYS),
        betas=st.sampled_from(BETAS),
        reference_steps=st.sampled_from([0, 1, 3]),
        clipping=st.sampled_from(CLIPPINGS),
    )
    def load_into_one_built_otherwise(self, index, clipping, **options):
        self.run.load(self.saved[index % len(self.saved)], fresh=True, **clipping, **options)
        self.kept = []

    @precondition(lambda self: any(self.run.fits(saved) for saved in self.saved))
    @rule(index=few, raw=st.booleans(), in_place=st.booleans())
    def write_back_without_load_state_dict(self, index, raw, in_place):
        fitting = [saved for saved in self.saved if self.run.fits(saved)]
        saved = fitting[index % len(fitting)]
        self.run.write_back(saved, raw=raw, in_place=in_place and self.run.can_write_in_place(saved))

    # Other optimizers

    @rule(
        steps=st.integers(0, 3), missing=positions, fresh=st.booleans(), through=st.sampled_from(["deepcopy", "file"])
    )
    def through_adamw(self, steps, missing, fresh, through):
        self.run.through_adamw(steps, self.all_but_one(missing), fresh=fresh, through=through)

    @rule(steps=st.integers(1, 3), missing=positions)
    def take_over_adamw(self, steps, missing):
        self.run.take_over_adamw(steps, self.all_but_one(missing))

    @precondition(lambda self: self.run.owner == "adamw")
    @rule(steps=st.integers(1, 3))
    def detach_and_attach(self, steps):
        self.all_but_one(set())
        self.run.detach_and_attach(steps)


COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
    "report_multiple_bugs": False,
}


def judge(**profile) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # lambda 5 exceeds 1/lr on purpose
        run_state_machine_as_test(StateMachine, settings=settings(**COMMON, **profile))


def test_random_sequences():
    judge(max_examples=500, stateful_step_count=30, derandomize=True)


@pytest.mark.slow
def test_many_long_random_sequences():
    judge(max_examples=int(os.environ.get("HF_SWD_STATE_MACHINE_EXAMPLES", "1500")), stateful_step_count=60)
