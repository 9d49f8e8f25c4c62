"""What happens to groups and state between two steps, one thing at a time; the state machine draws sequences of them.

The next decay is what the two-pass algorithm gives on the state that the optimizer holds then, and a run that goes on
from a checkpoint is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import copy
import math
import shutil
import warnings

import pytest
import torch
from mirrored_run import MirroredRun, through_file
from reference_adams import as_real64
from torch.nn import Parameter

from hf_swd import ScheduledWeightDecay


KERNELS = {"forloop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

owners = pytest.mark.parametrize("owner", ["adams", "adamw"])
every_kernel = pytest.mark.parametrize("path", KERNELS.values(), ids=KERNELS)


def params(*shapes, dtype=torch.float64):
    return [Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes or ((4, 3), (5,))]


def run_of(owner, groups=None, **options) -> MirroredRun:
    groups = groups or [{"params": params()}, {"params": params((2, 2)), "weight_decay": 0.05}]
    return MirroredRun(groups, owner=owner, **options)


def go_on(run: MirroredRun, steps: int = 3, missing=lambda step: (), scale: float = 0.1) -> None:
    """Steps whose gradients change in size, each compared with the reference."""
    for _ in range(steps):
        number = max(s["t"] for s in run.states) + len(run.params)
        run.give(run.random_gradients(number, scale * (1 + number % 3), missing=missing(number)))
        run.step()


def sometimes(step):
    return {step % 3, 0} if step % 2 else {step % 3}


@owners
class TestGroups:
    @pytest.mark.parametrize("loaded", [False, True], ids=["saved", "loaded"])
    def test_added_then_saved(self, owner, loaded):
        """A checkpoint that is written before the new group has made a step is still the schedule's own."""
        run = run_of(owner, reference_steps=5)
        go_on(run)
        run.add_group({"params": params((3,)), "weight_decay": 0.1})

        saved = run.save()

        assert [g["weight_decay"] for g in saved.state_dict["param_groups"]] == [0.01, 0.05, 0.1]
        for key in ("reference_steps", "schedule_step", "second_moment_mean", "num_elements", "reference_rms"):
            assert len({g[key] for g in saved.state_dict["param_groups"]}) == 1, key
        assert saved.state_dict["param_groups"][2]["reference_steps"] == 5
        if loaded:
            run.load(saved, fresh=True)
        go_on(run, 6)

    def test_added_then_loaded(self, owner):
        run = run_of(owner, reference_steps=2)
        run.add_group({"params": params((3,)), "weight_decay": 0.1})
        go_on(run)
        saved = run.save()

        other = run_of(owner, reference_steps=2)
        other.add_group({"params": params((3,)), "weight_decay": 0.1})
        other.load(saved)

        go_on(other)

    def test_all_cleared_and_added_anew(self, owner):
        run = run_of(owner, reference_steps=2)
        go_on(run)
        run.clear_groups_and_add_them_anew()
        assert all(group["reference_steps"] == 2 for group in run.groups)
        go_on(run)

    def test_all_cleared_and_added_anew_before_the_reference_step(self, owner):
        run = run_of(owner, reference_steps=5)
        go_on(run)
        run.clear_groups_and_add_them_anew()
        go_on(run, 4)

    def test_parameter_moved_to_a_group_of_another_beta2(self, owner):
        """Also where the parameters of all groups together stay in order."""
        run = run_of(owner, [{"params": params()}, {"params": params((2, 2)), "betas": (0.9, 0.9)}])
        go_on(run)
        run.move(run.params[2], 0)
        go_on(run)

    @pytest.mark.parametrize("clear_twice", [False, True], ids=["once", "twice"])
    def test_cleared_after_an_adamw_was_taken_over(self, owner, clear_twice):
        run = run_of(owner, reference_steps=6)
        run.take_over_adamw(4, seed=1)
        for _ in range(1 + clear_twice):
            run.clear_groups_and_add_them_anew()
        go_on(run, 4)


def test_group_added_then_schedule_removed():
    run = run_of("adamw")
    run.optimizer.add_param_group({"params": params((3,)), "weight_decay": 0.1})
    run.schedule.remove()
    assert [group["weight_decay"] for group in run.groups] == [0.01, 0.05, 0.1]
    ours = {"initial_weight_decay", "scheduled_weight_decay", "reference_steps", "unclipped_norm", "schedule_step"}
    assert not any(ours & set(group) for group in run.groups)
    saved = run.optimizer.state_dict()
    plain = torch.optim.AdamW(params())
    assert set(saved["param_groups"][0]) == set(plain.state_dict()["param_groups"][0])


def test_removed_in_mid_run_and_attached_again():
    run = run_of("adamw", reference_steps=2)
    go_on(run)
    run.detach_and_attach(3, seed=50)
    go_on(run)


@owners
class TestHyperparameters:
    @pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
    def test_betas_changed_after_a_load(self, owner, fresh):
        run = run_of(owner)
        go_on(run)
        run.load(run.save(), fresh=fresh)
        for i in range(2):
            run.set(i, "betas", (0.8, 0.9))
        go_on(run)

    def test_lambda_assigned_before_a_save_is_that_of_the_checkpoint(self, owner):
        run = run_of(owner, reference_steps=2)
        go_on(run)
        run.set(0, "weight_decay", 0.2)
        saved = run.save()
        assert saved.state_dict["param_groups"][0]["weight_decay"] == 0.2
        run.load(saved, fresh=True)
        go_on(run)

    def test_checkpoint_holds_the_users_lambda_and_plain_numbers(self, owner):
        run = run_of(owner, reference_steps=2)
        go_on(run)
        state_dict = run.save().state_dict
        for saved, value in zip(state_dict["param_groups"], (0.01, 0.05), strict=True):
            decays = {
                saved.get(key, value) for key in ("weight_decay", "initial_weight_decay", "scheduled_weight_decay")
            }
            assert decays == {value}
            assert type(saved["schedule_step"]) is int and saved["schedule_step"] == 3
            for key in ("second_moment_mean", "num_elements", "reference_rms"):
                assert type(saved[key]) is float, key
        for state, s in zip(state_dict["state"].values(), run.states, strict=True):
            assert type(state["second_moment_sum"]) is type(state["second_moment_step"]) is float
            assert state["second_moment_step"] == 3
            assert math.isclose(state["second_moment_sum"], s["v"].sum().item(), rel_tol=1e-12)

    def test_options_of_the_checkpoint_win(self, owner):
        run = run_of(owner, reference_steps=2)
        go_on(run)
        run.load(run.save(), fresh=True, reference_steps=0, weight_decay=0.7, lr=0.5, betas=(0.5, 0.5))
        assert [group["reference_steps"] for group in run.groups] == [2, 2]
        go_on(run)
        assert run.optimizer.defaults["weight_decay"] == 0.7
        if owner == "adams":
            assert run.optimizer.defaults["reference_steps"] == 0


@every_kernel
@owners
class TestState:
    def test_popped(self, owner, path):
        run = run_of(owner, path=path)
        go_on(run, scale=10.0)
        run.pop_state(run.params[0])
        go_on(run)

    @pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
    def test_cleared(self, owner, path, reference_steps):
        run = run_of(owner, path=path, reference_steps=reference_steps)
        go_on(run, scale=10.0)
        run.clear_state()
        go_on(run)

    @pytest.mark.parametrize("then", ["step", "clip", "save", "load", "move", "copy", "no gradients", "new key"])
    @pytest.mark.parametrize("replace", [False, True], ids=["in_place", "replaced"])
    def test_scaled(self, owner, path, then, replace):
        """Whatever looks at the state first after the change, the number beside the moment is no longer its sum."""
        run = run_of(owner, path=path)
        go_on(run)
        run.scale_state(run.params[0], 0.25, replace=replace)
        if then == "clip":
            run.give(run.random_gradients(77, 0.1))
            run.clip(0.2)
            run.move(run.params[1], 1)
            run.step()
        elif then == "save":
            run.save()
        elif then == "load":
            run.load(run.save(), fresh=True)
        elif then == "move":
            run.move(run.params[1], 1)
        elif then == "copy":
            run.copied("deepcopy")
        elif then == "new key":
            run.replace(run.params[0], Parameter(run.params[0].detach().clone()), keep_state=True)
        elif then == "no gradients":
            run.look()
            run.load(run.save())
        go_on(run)

    def test_step_count_changed_in_place(self, owner, path):
        run = run_of(owner, path=path)
        go_on(run)
        run.set_step(run.params[0], 50)
        go_on(run)

    def test_entries_removed(self, owner, path):
        run = run_of(owner, path=path)
        go_on(run)
        for names in (["second_moment_sum"], ["second_moment_step"], ["second_moment_sum", "second_moment_step"]):
            run.pop_entries(run.params[0], names)
            run.load(run.save("file"))
            run.pop_entries(run.params[1], names)
            go_on(run, 1)

    @pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
    @pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
    def test_loaded_then_parameter_and_state_replaced(self, owner, path, fresh, all_of_them):
        """A new head: the optimizer is not one without second moments because a parameter has none yet."""
        run = run_of(owner, path=path)
        go_on(run, scale=10.0)
        run.load(run.save(), fresh=fresh)
        for p in run.params if all_of_them else run.params[-1:]:
            run.replace(p, Parameter(torch.randn(7, dtype=p.dtype)), keep_state=False)
        go_on(run)

    def test_parameter_replaced_with_its_state(self, owner, path):
        run = run_of(owner, path=path)
        go_on(run)
        run.replace(run.params[0], Parameter(run.params[0].detach().clone()), keep_state=True)
        go_on(run)

    def test_parameter_taken_out_and_put_back(self, owner, path):
        run = run_of(owner, path=path)
        go_on(run)
        kept = run.take_out(run.params[0])
        go_on(run)
        run.put_back(1, kept)
        go_on(run)


@owners
class TestClippingThenEdits:
    """What clipping knows of the gradients is used for these gradients, or not at all."""

    @pytest.mark.parametrize("defer", [False, True], ids=["clipped", "deferred"])
    @pytest.mark.parametrize("edit", ["move", "take_out", "add", "replace"])
    def test_parameter_without_gradient(self, owner, edit, defer):
        run = run_of(owner, [{"params": params((4, 3), (5,), ())}])
        go_on(run)
        run.give(run.random_gradients(50, 0.1, missing={0}))
        run.clip(0.2, defer)
        first = run.params[0]
        if edit == "move":
            run.move(first, 0)  # to the end
        elif edit == "take_out":
            run.take_out(first)
        elif edit == "add":
            run.add_group({"params": params((3,))})
        else:
            run.replace(first, params((2, 2))[0], keep_state=False)
        run.step()
        go_on(run)

    def test_gradient_changed_after_a_deferred_clipping(self, owner):
        run = run_of(owner)
        go_on(run)
        run.give(run.random_gradients(50, 1.0))
        run.clip(0.2, defer=True)
        run.change_gradient(run.params[0], 2.0)
        run.step()  # of AdamS raises, before a weight changes
        go_on(run)


@owners
class TestOtherOptimizers:
    @pytest.mark.parametrize("through", ["deepcopy", "file"])
    @pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
    @pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
    def test_to_adamw_and_back(self, owner, reference_steps, fresh, through):
        """AdamW runs with the user's lambda, and what it makes of the moments is what the schedule goes on from."""
        run = run_of(owner, reference_steps=reference_steps)
        go_on(run, 4, scale=10.0)
        run.through_adamw(60, seed=100, missing={0}, fresh=fresh, through=through)
        go_on(run, 4)

    def test_to_adamw_and_back_before_the_first_step(self, owner):
        run = run_of(owner, reference_steps=4)
        run.through_adamw(3, seed=100)
        go_on(run, 4)

    @pytest.mark.parametrize("stepped", [0, 5])
    def test_takes_over_an_adamw_that_has_never_seen_a_schedule(self, owner, stepped):
        run = run_of(owner, reference_steps=4)
        go_on(run, stepped)
        run.take_over_adamw(3, seed=100)
        go_on(run, 4)


@owners
class TestGroupsWrittenWithoutLoadStateDict:
    """As DeepSpeed's universal loader does it."""

    @pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "replaced"])
    @pytest.mark.parametrize("raw", [True, False], ids=["raw", "saved"])
    @pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
    def test_back_to_an_earlier_step(self, owner, reference_steps, raw, in_place):
        run = run_of(owner, reference_steps=reference_steps)
        go_on(run, 3)
        saved = run.save()
        go_on(run, 3, scale=10.0)
        run.write_back(saved, raw=raw, in_place=in_place)
        go_on(run)

    @pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "replaced"])
    @pytest.mark.parametrize("raw", [True, False], ids=["raw", "saved"])
    def test_of_the_same_step(self, owner, raw, in_place):
        """Of another run that has made as many steps: no counter tells."""
        run, other = run_of(owner), run_of(owner)
        go_on(run, 3)
        go_on(other, 3, scale=10.0)
        run.write_back(other.save(), raw=raw, in_place=in_place)
        go_on(run)


def twins(owner, run: MirroredRun, saved) -> tuple:
    """The uninterrupted optimizer, and a fresh one with the checkpoint."""
    groups = [{"params": [Parameter(p.detach().clone()) for p in group["params"]]} for group in run.groups]
    optimizer, schedule = run.build(groups)
    optimizer.load_state_dict(saved)
    return (run.optimizer, run.schedule), (optimizer, schedule)


def same_bits(p: torch.Tensor, q: torch.Tensor) -> bool:
    return torch.equal(as_real64(p).nan_to_num(), as_real64(q).nan_to_num())


def shown(optimizer, schedule) -> tuple:
    return (
        schedule.grad_rms,
        schedule.step_count,
        *(float(group["weight_decay"]) for group in optimizer.param_groups),
    )


FAMILIES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "complex64": torch.complex64,
}  # fmt: skip
COMBINATIONS = [
    (dtype, kernel) for dtype in FAMILIES for kernel in KERNELS if not (dtype == "complex64" and kernel == "fused")
]


@pytest.mark.parametrize("options", [{}, {"reference_steps": 3}, {"reference_steps": 12}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("missing", [lambda step: (), sometimes], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize(("dtype", "kernel"), COMBINATIONS)
@owners
def test_resume_is_the_uninterrupted_run_bit_for_bit(owner, dtype, kernel, missing, options):
    """As with torch's AdamW: weights, and what is logged."""
    groups = [
        {"params": params(dtype=FAMILIES[dtype])},
        {"params": params((2, 2), (), dtype=FAMILIES[dtype]), "weight_decay": 0.05},
    ]
    run = run_of(owner, groups, path=KERNELS[kernel], **options)
    for step in range(7):
        run.give(run.random_gradients(step, 0.1 + step, missing=missing(step)))
        run.optimizer.step()

    straight, resumed = twins(owner, run, through_file(run.optimizer.state_dict()))

    assert shown(*straight) == shown(*resumed)
    for step in range(7, 20):
        gradients = run.random_gradients(step, 0.1 + step % 5, missing=missing(step))
        for optimizer, _ in (straight, resumed):
            for p, g in zip((p for group in optimizer.param_groups for p in group["params"]), gradients, strict=True):
                p.grad = None if g is None else g.to(p.dtype)
            optimizer.step()
        assert shown(*straight) == shown(*resumed), f"step {step}"
        for mine, theirs in zip(straight[0].param_groups, resumed[0].param_groups, strict=True):
            for p, q in zip(mine["params"], theirs["params"], strict=True):
                assert same_bits(p, q), f"step {step}"


@pytest.mark.parametrize("unclipped_norm", [False, True])
@owners
def test_resume_with_clipping_bit_for_bit(owner, unclipped_norm):
    run = run_of(owner, unclipped_norm=unclipped_norm)

    def step(optimizer, schedule, number):
        ps = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(ps, run.random_gradients(number, 0.1 + number % 4), strict=True):
            p.grad = g.to(p.dtype)
        schedule.clip_grad_norm_(0.5)
        optimizer.step()

    for number in range(5):
        step(run.optimizer, run.schedule, number)
    straight, resumed = twins(owner, run, through_file(run.optimizer.state_dict()))
    for number in range(5, 15):
        step(*straight, number)
        step(*resumed, number)
        assert shown(*straight) == shown(*resumed)
    for mine, theirs in zip(straight[0].param_groups, resumed[0].param_groups, strict=True):
        assert all(map(torch.equal, mine["params"], theirs["params"]))


@every_kernel
@owners
def test_moments_that_overflowed_are_resumed_bit_for_bit(owner, path):
    """A gradient of 1e21 makes `exp_avg_sq` infinite in float32, after which Adam leaves that weight alone."""
    run = run_of(owner, [{"params": params(dtype=torch.float32)}], path=path)
    for step in range(4):
        gradients = run.random_gradients(step)
        if step == 2:
            gradients[0][0, 0] = 1e21
        run.give(gradients)
        run.optimizer.step()
    assert not run.optimizer.state[run.params[0]]["exp_avg_sq"].isfinite().all()

    straight, resumed = twins(owner, run, through_file(run.optimizer.state_dict()))
    for step in range(4, 8):
        gradients = run.random_gradients(step)
        for optimizer, _ in (straight, resumed):
            for p, g in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
        assert shown(*straight) == shown(*resumed)
        for p, q in zip(straight[0].param_groups[0]["params"], resumed[0].param_groups[0]["params"], strict=True):
            assert p.isfinite().all() and torch.equal(p, q)


@every_kernel
@owners
def test_moments_that_overflowed_under_adamw_do_not_destroy_the_weights(owner, path):
    """The true sum is lost; what is left of it is infinite, and does not decay."""
    run = run_of(owner, [{"params": params(dtype=torch.float32)}], path=path)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in run.groups], **path)
    gradients = run.random_gradients(0)
    gradients[0][0, 0] = 1e21
    run.give(gradients)
    adamw.step()
    run.optimizer.load_state_dict(adamw.state_dict())
    run.give(run.random_gradients(1))
    run.optimizer.step()
    assert all(p.isfinite().all() for p in run.params)


@owners
def test_adamw_runs_a_checkpoint_with_the_users_lambda(owner):
    """Its steps are those of an AdamW that was built with it."""
    run = run_of(owner, reference_steps=2)
    go_on(run, scale=10.0)
    saved = run.save("file").state_dict
    groups = [{"params": [Parameter(p.detach().clone()) for p in group["params"]]} for group in run.groups]
    adamw = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.9)
    adamw.load_state_dict(saved)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.01, 0.05]

    gradients = run.random_gradients(9, 0.1)
    run.give(gradients)
    run.reference.adamw_step([[run.seen[p] for p in group["params"]] for group in run.groups])
    theirs = [p for group in adamw.param_groups for p in group["params"]]
    for p, g in zip(theirs, gradients, strict=True):
        p.grad = g
    adamw.step()
    expected = [p for group in run.reference.groups for p in group["params"]]
    for p, q in zip(theirs, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


@every_kernel
@owners
def test_amsgrad_in_float16_whose_moments_underflow(owner, path):
    """(1 - beta2) g^2 of gradients of 1e-4 is 1e-11, and float16 ends at 6e-8: its maximum is 0, the gradients' sum is
    not."""
    run = run_of(owner, [{"params": params(dtype=torch.float16)}], path=path, amsgrad=True)
    for step in range(6):
        run.give(run.random_gradients(step, 1e-4))
        expected = run.reference
        run.optimizer.step()
        # The reference's own v is in float64, and gradients of one size make its maximum its mean.
        expected.step([[run.seen[p] for p in group["params"]] for group in run.groups])
        sums = [s["v"].sum().item() / (1 - 0.999 ** s["t"]) for s in run.states]
        rms = math.sqrt(sum(sums) / sum(s["v"].numel() for s in run.states))
        owner_of_rms = run.optimizer if owner == "adams" else run.schedule
        assert math.isclose(owner_of_rms.grad_rms, rms, rel_tol=1e-3), step
    assert all(not run.optimizer.state[p]["max_exp_avg_sq"].any() for p in run.params)


def torchao_optimizer(name: str):
    pytest.importorskip("torchao")
    import torchao.optim

    return getattr(torchao.optim, name)


# torchao's step goes through torch.compile.
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_low_bit_adamw_of_torchao_resumes_exactly(name):
    """Their states have no operators of their own, a sum for instance; they can be widened."""
    cls = torchao_optimizer(name)

    def build(weights):
        optimizer = cls([Parameter(w.clone()) for w in weights], lr=1e-2, weight_decay=1e-2)
        return optimizer, ScheduledWeightDecay(optimizer)

    def step(optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator) * (0.1 + number % 3)
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's, of torchao's own step
        straight = build([torch.randn(64, 128), torch.randn(7)])  # the second is kept in float32
        for number in range(4):
            step(straight[0], number)
        weights = [p.detach() for p in straight[0].param_groups[0]["params"]]
        resumed = build(weights)
        resumed[0].load_state_dict(through_file(straight[0].state_dict(), weights_only=False))
        assert shown(*straight) == shown(*resumed)
        for number in range(4, 9):
            step(straight[0], number)
            step(resumed[0], number)
            assert shown(*straight) == shown(*resumed), number
        for p, q in zip(weights, resumed[0].param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)


@needs_compiler
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_low_bit_moments_are_taken_over_from_another_optimizer(name):
    """Without entries: the sum is that of the widened moment."""
    cls = torchao_optimizer(name)
    p = Parameter(torch.randn(64, 128))
    plain = cls([p], lr=1e-2, weight_decay=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.grad = torch.randn_like(p)
        plain.step()
        v = plain.state[p]["exp_avg_sq"].dequantize().double()
        other = cls([p], lr=1e-2, weight_decay=1e-2)
        schedule = ScheduledWeightDecay(other)
        other.load_state_dict(through_file(plain.state_dict(), weights_only=False))
        p.grad = torch.randn_like(p)
        expected = (0.999 * v + 0.001 * p.grad.double() ** 2).mean() / (1 - 0.999**2)
        other.step()
    assert math.isclose(schedule.grad_rms, expected.sqrt().item(), rel_tol=1e-5)


class TestCheckpointsOf01:
    """Version 0.1 wrote no sums, and the effective decay into `weight_decay`."""

    @staticmethod
    def old_format(run: MirroredRun, state_dict: dict) -> dict:
        """A checkpoint as 0.1 wrote it in the state that this run is in."""
        reference = run.reference
        groups = []
        for group, saved in zip(reference.groups, state_dict["param_groups"], strict=True):
            active = [s for s in run.states if s["t"]]
            groups.append(
                {
                    **{
                        key: saved[key]
                        for key in ("lr", "betas", "eps", "amsgrad", "maximize", "foreach", "capturable")
                    },
                    **{key: saved[key] for key in ("differentiable", "fused", "params")},
                    **{key: saved[key] for key in ("decoupled_weight_decay",) if key in saved},  # not in torch 2.6
                    "weight_decay": group["decay"],
                    "initial_weight_decay": group["weight_decay"],
                    "scheduled_weight_decay": group["decay"],
                    "reference_steps": reference.reference_steps,
                    "unclipped_norm": reference.unclipped_norm,
                    "schedule_step": reference.steps,
                    "second_moment_mean": reference.v_bar,
                    "num_elements": float(sum(s["v"].numel() for s in active)),
                    "reference_rms": reference.reference_rms,
                }
            )
        ours = ("second_moment_sum", "second_moment_step")
        state = {
            i: {key: value for key, value in values.items() if key not in ours}
            for i, values in state_dict["state"].items()
        }
        return copy.deepcopy({"state": state, "param_groups": groups})

    @pytest.mark.parametrize(
        "options", [{}, {"reference_steps": 2}, {"reference_steps": 9}, {"amsgrad": True}], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @owners
    def test_continues(self, owner, dtype, options):
        groups = [{"params": params(dtype=dtype)}, {"params": params((2, 2), dtype=dtype), "weight_decay": 0.05}]
        run = run_of(owner, groups, **options)
        go_on(run, 4, missing=sometimes)
        old = self.old_format(run, run.optimizer.state_dict())
        fresh = [{"params": [Parameter(p.detach().clone()) for p in group["params"]]} for group in run.groups]
        run.optimizer, run.schedule = run.build(fresh)

        run.optimizer.load_state_dict(through_file(old))

        assert [g["weight_decay"] for g in run.optimizer.state_dict()["param_groups"]] == [0.01, 0.05]
        for _ in range(5):
            go_on(run, 1, missing=sometimes)
            rms = (run.optimizer if owner == "adams" else run.schedule).grad_rms
            assert math.isclose(rms, run.reference.grad_rms, rel_tol=1e-6)

    def test_lambda_that_was_assigned_before_the_save(self):
        run = run_of("adams")
        go_on(run, 4)
        old = self.old_format(run, run.optimizer.state_dict())
        old["param_groups"][0]["weight_decay"] = 0.3  # differs from scheduled_weight_decay
        run.optimizer.load_state_dict(old)
        assert run.optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.3

    @pytest.mark.parametrize(
        "missing", [lambda step: (), lambda step: {0} if step == 3 else ()], ids=["all_gradients", "missing"]
    )
    @pytest.mark.parametrize("why", ["bfloat16", "float16", "unclipped_norm"])
    @owners
    def test_without_the_sums_it_continues_as_it_was_or_is_refused(self, owner, why, missing):
        """Adam's moments do not add up to what the schedule had seen: they were rounded, or are of other gradients."""
        dtype = torch.float32 if why == "unclipped_norm" else getattr(torch, why)
        run = run_of(owner, [{"params": params(dtype=dtype)}], unclipped_norm=why == "unclipped_norm")

        def step(number):
            run.give(run.random_gradients(number, 0.1 + number % 3, missing=missing(number)))
            if why == "unclipped_norm":
                run.clip(0.5)
            run.step()

        for number in range(4):
            step(number)
        old = self.old_format(run, run.optimizer.state_dict())
        old["param_groups"][0]["num_elements"] = float(
            sum(p.numel() for i, p in enumerate(run.params) if i not in missing(3))
        )

        weights = [p.detach().clone() for p in run.params]
        run.optimizer, run.schedule = run.build([{"params": [Parameter(w.clone()) for w in weights]}])
        try:
            run.optimizer.load_state_dict(through_file(old))
            run.give(run.random_gradients(4, 0.5))
            if why == "unclipped_norm":
                run.clip(0.5)
            run.optimizer.step()
        except (RuntimeError, ValueError) as error:
            assert "0.1" in str(error)
            assert all(map(torch.equal, run.params, weights))
            return
        run.optimizer, run.schedule = run.build([{"params": [Parameter(w.clone()) for w in weights]}])
        run.optimizer.load_state_dict(through_file(old))
        for number in range(4, 8):
            step(number)
