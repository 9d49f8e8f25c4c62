"""The judge of the schedule's state: random sequences of whatever can happen to an optimizer between its steps.

After every step the effective decay of each group, grad_rms, the step count and the weights are those of the
reference, which is in float64, takes every mean over all elements, and keeps its moments parameter by parameter.
`tests/support/mirrored_run.py` says what each operation is; here are the sequences. The long run
(marker `slow`; HF_SWD_STATE_MACHINE_EXAMPLES sets its length) draws new ones each time.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mirrored_run import MirroredRun
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

ENTRIES = (("second_moment_sum", "second_moment_step"), ("second_moment_sum",), ("second_moment_step",))

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
        unclipped_norm=st.sampled_from([False, False, False, True]),
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        seed=numbers,
    )
    def build(self, data, family, owner, amsgrad, maximize, reference_steps, unclipped_norm, sizes, seed):
        torch.manual_seed(seed)
        self.dtypes, kernels = FAMILIES[family]
        self.kernels = [KERNELS[name] for name in kernels]
        groups = [
            {
                "params": [self.new_param(i) for i in range(size)],
                "lr": data.draw(st.sampled_from(RATES[:3])),
                "betas": data.draw(st.sampled_from(BETAS)),
                "weight_decay": data.draw(st.sampled_from(DECAYS)),
            }
            for size in sizes
        ]
        self.run = MirroredRun(
            groups,
            owner=owner,
            path=data.draw(st.sampled_from(self.kernels)),
            reference_steps=reference_steps,
            unclipped_norm=unclipped_norm,
            amsgrad=amsgrad,
            maximize=maximize,
        )
        self.saved, self.kept = [], []

    def new_param(self, number: int) -> Parameter:
        return Parameter(
            torch.randn(SHAPES[number % len(SHAPES)], dtype=torch.complex128).to(
                self.dtypes[number // len(SHAPES) % len(self.dtypes)]
            )
            if self.dtypes[number // len(SHAPES) % len(self.dtypes)].is_complex
            else torch.randn(SHAPES[number % len(SHAPES)]).to(self.dtypes[number // len(SHAPES) % len(self.dtypes)])
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

    def give(self, seed, scale, missing, zero):
        self.run.give(self.run.random_gradients(seed, scale, missing, zero))

    @rule(
        seed=numbers,
        count=st.integers(1, 4),
        scale=st.sampled_from([0.1, 1.0, 0.01]),
        missing=positions,
        zero=positions,
    )
    def steps(self, seed, count, scale, missing, zero):
        for i in range(count):
            self.give(seed + i, scale, missing, zero)
            if self.run.reference.unclipped_norm:
                self.run.clip(0.5)
            self.run.step()

    @rule(seed=numbers, missing=positions)
    def zero_gradients(self, seed, missing):
        self.give(seed, 0.0, missing, ())
        self.run.step()

    @rule(
        seed=numbers,
        scale=st.sampled_from([0.1, 1.0, 10.0]),
        missing=positions,
        zero=positions,
        max_norm=st.sampled_from([0.5, 2.0, float("inf")]),
        defer=st.booleans(),
    )
    def give_and_clip(self, seed, scale, missing, zero, max_norm, defer):
        """Whatever comes now comes between clipping and step."""
        self.give(seed, scale, missing, zero)
        self.run.clip(max_norm, defer)

    @precondition(lambda self: self.run.seen and not self.run.reference.unclipped_norm)
    @rule(max_norm=st.sampled_from([0.25, 1.0]), defer=st.booleans())
    def clip_again(self, max_norm, defer):
        self.run.clip(max_norm, defer)

    @precondition(lambda self: self.run.seen)
    @rule(number=numbers, replace=st.booleans())
    def change_a_gradient(self, number, replace):
        params = [p for p in self.run.params if p in self.run.seen and p.numel()]
        assume(params)
        self.run.change_gradient(params[number % len(params)], 1.5, replace=replace)

    @rule(closure=st.booleans())
    def step(self, closure):
        self.run.step(closure=closure and self.run.owner == "adams")

    # Groups

    @rule(number=few, value=st.sampled_from(DECAYS))
    def assign_weight_decay(self, number, value):
        self.run.set(self.pick_group(number), "weight_decay", value)

    @rule(number=few, value=st.sampled_from(RATES))
    def assign_lr(self, number, value):
        self.run.set(self.pick_group(number), "lr", value)

    @rule(number=few, value=st.sampled_from(BETAS))
    def assign_betas(self, number, value):
        self.run.set(self.pick_group(number), "betas", value)

    @rule(index=few)
    def other_kernels(self, index):
        self.run.set_path(self.kernels[index % len(self.kernels)])

    @precondition(lambda self: len(self.run.params) < MAX_PARAMS)
    @rule(number=numbers, decay=st.sampled_from(DECAYS), beta=st.sampled_from(BETAS), amount=st.integers(1, 2))
    def add_group(self, number, decay, beta, amount):
        # A group takes amsgrad and the like from the constructor's arguments, which are those of this run.
        group = {"weight_decay": decay, "betas": beta} if number % 3 else {}
        self.run.add_group({**group, "params": [self.new_param(number + i) for i in range(amount)]})

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

    @rule(number=numbers, factor=st.sampled_from([0.25, 4.0]), replace=st.booleans(), look=st.booleans())
    def scale_state(self, number, factor, replace, look):
        self.run.scale_state(self.pick(number), factor, replace=replace)
        if look:
            self.run.look()

    @rule(number=numbers, step=st.integers(1, 20))
    def set_step(self, number, step):
        self.run.set_step(self.pick(number), step)

    @rule(number=numbers, names=st.sampled_from(ENTRIES))
    def pop_entries(self, number, names):
        # Whether a sum without its step is believed matters where moments do not tell what it was; either is right.
        differ = self.run.low_precision or self.run.reference.unclipped_norm
        self.run.pop_entries(self.pick(number), ENTRIES[0] if differ else names)

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
    @rule(index=few, weights=st.booleans(), schedule=st.sampled_from(["none", "before", "after"]))
    def load(self, index, weights, schedule):
        self.run.load(self.saved[index % len(self.saved)], weights=weights, schedule=schedule)

    @precondition(lambda self: self.saved)
    @rule(index=few, schedule=st.sampled_from(["none", "before", "after"]))
    def load_into_a_fresh_one(self, index, schedule):
        self.run.load(self.saved[index % len(self.saved)], fresh=True, schedule=schedule)
        self.kept = []

    @precondition(lambda self: self.saved)
    @rule(
        index=few,
        lr=st.sampled_from(RATES),
        weight_decay=st.sampled_from(DECAYS),
        betas=st.sampled_from(BETAS),
        reference_steps=st.sampled_from([0, 1, 3]),
        unclipped_norm=st.booleans(),
    )
    def load_into_one_built_otherwise(self, index, **options):
        self.run.load(self.saved[index % len(self.saved)], fresh=True, **options)
        self.kept = []

    @precondition(lambda self: any(self.run.fits(saved) for saved in self.saved))
    @rule(index=few, raw=st.booleans(), in_place=st.booleans())
    def write_back_without_load_state_dict(self, index, raw, in_place):
        fitting = [saved for saved in self.saved if self.run.fits(saved)]
        saved = fitting[index % len(fitting)]
        self.run.write_back(saved, raw=raw, in_place=in_place and self.run.can_write_in_place(saved))

    # Other optimizers

    @rule(
        steps=st.integers(0, 3),
        seed=numbers,
        missing=positions,
        fresh=st.booleans(),
        through=st.sampled_from(["deepcopy", "file"]),
    )
    def through_adamw(self, steps, seed, missing, fresh, through):
        missing = self.all_but_one(missing)
        self.run.through_adamw(steps, seed, missing, fresh=fresh, through=through)

    @rule(steps=st.integers(1, 3), seed=numbers, missing=positions)
    def take_over_adamw(self, steps, seed, missing):
        missing = self.all_but_one(missing)
        self.run.take_over_adamw(steps, seed, missing)

    @precondition(lambda self: self.run.owner == "adamw")
    @rule(steps=st.integers(1, 3), seed=numbers)
    def detach_and_attach(self, steps, seed):
        self.all_but_one(set())
        self.run.detach_and_attach(steps, seed)


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
