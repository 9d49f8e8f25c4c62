"""What happens to groups and state between two steps, one thing at a time; the state machine draws sequences of them.

The next decay is what the two-pass algorithm gives on the state that the optimizer holds then, and a run that goes on
from a checkpoint is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from lockstep import LockStep, parameters, same_bits, through_file
from torch.nn import Parameter

from hf_swd import ScheduledWeightDecay
from hf_swd.core.wrappers import schedule_of


KERNELS = {"forloop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

owners = pytest.mark.parametrize("owner", ["adams", "adamw"])
every_kernel = pytest.mark.parametrize("path", KERNELS.values(), ids=KERNELS)


def params(*shapes, dtype=torch.float64):
    return parameters(shapes or ((4, 3), (5,)), dtype)


def run_of(owner, groups=None, **options) -> LockStep:
    groups = groups or [{"params": params()}, {"params": params((2, 2)), "weight_decay": 0.05}]
    return LockStep(groups, owner=owner, **{"rms_rtol": 1e-9, **options})


def go_on(run: LockStep, steps: int = 3, missing=lambda step: (), scale: float = 0.1) -> None:
    """Steps whose gradients change in size, each compared with the reference."""
    for step in range(steps):
        run.step(run.gradients(lambda i, _, step=step: i in missing(step), scale=scale * (1 + step % 3)))


def sometimes(step):
    return {step % 3, 0} if step % 2 else {step % 3}


# Groups and hyperparameters


@pytest.mark.parametrize("loaded", [False, True], ids=["saved", "loaded"])
@owners
def test_group_added_then_saved(owner, loaded):
    """A checkpoint that is written before the new group has made a step is still the schedule's own."""
    run = run_of(owner, reference_steps=5)
    go_on(run)
    run.add_group({"params": params((3,)), "weight_decay": 0.1})

    saved = run.save()

    assert [g["weight_decay"] for g in saved.state_dict["param_groups"]] == [0.01, 0.05, 0.1]
    for key in ("reference_steps", "schedule_step", "second_moment_mean", "reference_rms"):
        assert len({g[key] for g in saved.state_dict["param_groups"]}) == 1, key
    assert saved.state_dict["param_groups"][2]["reference_steps"] == 5
    if loaded:
        run.load(saved, fresh=True)
    go_on(run, 6)


@pytest.mark.parametrize("owner", ["adams", "adamw"])
def test_group_added_to_one_that_has_a_checkpoints_options(owner):
    """It goes by them, whatever the constructor was told, also when no other group is left."""
    saved = run_of(owner, reference_steps=2)
    go_on(saved)
    run = run_of(owner, reference_steps=0, max_grad_norm=7.0)
    run.load(saved.save())
    run.add_group({"params": params((3,)), "weight_decay": 0.1})
    go_on(run, 1)
    for _ in range(2):
        run.remove_group(0)
    assert (run.schedule.reference_steps, run.groups[0]["max_grad_norm"]) == (2, 0.0)
    go_on(run)


@owners
def test_groups_cleared_and_added_anew_begin_with_the_moments(owner):
    """What stood in them is gone with them: Adam's steps count, and r is taken anew."""
    run = run_of(owner, reference_steps=2)
    go_on(run, 4)
    run.clear_groups_and_add_them_anew()
    go_on(run)
    assert run.schedule.step_count == 7


@owners
def test_parameter_moved_to_a_group_of_another_beta2(owner):
    """Also where the parameters of all groups together stay in order."""
    run = run_of(owner, [{"params": params()}, {"params": params((2, 2)), "betas": (0.9, 0.9)}])
    go_on(run)
    run.move(run.params[2], 0)
    go_on(run)


def test_group_added_then_schedule_removed():
    run = run_of("adamw")
    run.optimizer.add_param_group({"params": params((3,)), "weight_decay": 0.1})
    run.schedule.remove()
    assert [group["weight_decay"] for group in run.groups] == [0.01, 0.05, 0.1]
    plain = torch.optim.AdamW(params())
    for groups in (run.groups, run.optimizer.state_dict()["param_groups"]):
        assert all(set(group) == set(plain.param_groups[0]) for group in groups)


def test_removed_in_mid_run_and_attached_again():
    run = run_of("adamw", reference_steps=2)
    go_on(run)
    run.detach_and_attach(3)
    go_on(run)


@pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
@owners
def test_betas_changed_after_a_load(owner, fresh):
    run = run_of(owner)
    go_on(run)
    run.load(run.save(), fresh=fresh)
    for i in range(2):
        run.set(i, "betas", (0.8, 0.9))
    go_on(run)


@owners
def test_lambda_assigned_before_a_save_is_that_of_the_checkpoint(owner):
    run = run_of(owner, reference_steps=2)
    go_on(run)
    run.set(0, "weight_decay", 0.2)
    saved = run.save()
    assert saved.state_dict["param_groups"][0]["weight_decay"] == 0.2
    run.load(saved, fresh=True)
    go_on(run)


@owners
def test_options_of_the_checkpoint_win(owner):
    run = run_of(owner, reference_steps=2, max_grad_norm=0.5)
    go_on(run, 0)
    run.set_gradients(run.gradients())
    run.step_with_what_is_there()
    run.load(run.save(), fresh=True, reference_steps=0, max_grad_norm=0.0, weight_decay=0.7, betas=(0.5, 0.5))
    assert [(group["reference_steps"], group["max_grad_norm"]) for group in run.groups] == [(2, 0.5)] * 2
    for _ in range(3):
        run.set_gradients(run.gradients())
        run.step_with_what_is_there()
    assert run.optimizer.defaults["weight_decay"] == 0.7


# State


@pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
@every_kernel
@owners
def test_state_popped_and_cleared(owner, path, reference_steps):
    run = run_of(owner, path=path, reference_steps=reference_steps)
    go_on(run, scale=10.0)
    run.pop_state(run.params[0])
    go_on(run)
    run.clear_state()
    go_on(run)


@pytest.mark.parametrize("then", ["refresh", "save and load", "other set", "copy", "new key"])
@every_kernel
@owners
def test_moment_scaled_in_place_counts_when_the_schedule_reads(owner, path, then):
    run = run_of(owner, path=path)
    go_on(run)
    run.scale_state(run.params[0], 0.25, how="in place")
    if then == "refresh":
        run.refresh()
    elif then == "save and load":
        run.load(run.save(), fresh=True)
    elif then == "other set":
        go_on(run, 1, missing=lambda step: {1})
    elif then == "copy":
        run.copied("deepcopy")
    else:
        run.replace(run.params[0], Parameter(run.params[0].detach().clone()), keep_state=True)
    go_on(run, 1)
    assert not run.stale
    go_on(run)


@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
@owners
def test_loaded_then_parameter_and_state_replaced(owner, fresh, all_of_them):
    """A new head: the optimizer is not one without second moments because a parameter has none yet."""
    run = run_of(owner)
    go_on(run, scale=10.0)
    run.load(run.save(), fresh=fresh)
    for p in run.params if all_of_them else run.params[-1:]:
        run.replace(p, Parameter(torch.randn(7, dtype=p.dtype)), keep_state=False)
    go_on(run)


def test_parameter_that_grows_in_place_counts_with_its_new_size():
    """As embeddings do for new tokens. A mean that no moments tell is carried on, over the scalars that are there."""
    param = Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([param], weight_decay=0.01)
    schedule = ScheduledWeightDecay(optimizer, beta2=0.9)

    for size in (4, 6):
        optimizer.state.clear()
        param.grad = None
        param.data = torch.zeros(size)
        param.grad = torch.ones(size)
        optimizer.step()

    assert float(schedule.grad_rms) == pytest.approx(1.0)


@owners
def test_parameter_taken_out_and_put_back(owner):
    run = run_of(owner)
    go_on(run)
    kept = run.take_out(run.params[0])
    go_on(run)
    run.put_back(1, kept)
    go_on(run)


@pytest.mark.parametrize("through", ["deepcopy", "file"])
@pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
@pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("stepped", [0, 4])
@owners
def test_to_adamw_and_back(owner, stepped, reference_steps, fresh, through):
    """AdamW runs with the user's lambda, and what it makes of the moments is what the schedule goes on from."""
    run = run_of(owner, reference_steps=reference_steps)
    go_on(run, stepped, scale=10.0)
    run.through_adamw(60, missing={0} if stepped else (), fresh=fresh, through=through)
    go_on(run, 4)


@pytest.mark.parametrize("stepped", [0, 5])
@owners
def test_takes_over_an_adamw_that_has_never_seen_a_schedule(owner, stepped):
    run = run_of(owner, reference_steps=4)
    go_on(run, stepped)
    run.take_over_adamw(3)
    go_on(run, 4)


@pytest.mark.parametrize("another", [False, True], ids=["earlier", "of-another-run-of-the-same-step"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "replaced"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "saved"])
@owners
def test_written_back_without_load_state_dict(owner, raw, in_place, another):
    """As DeepSpeed's universal loader does it."""
    run, other = run_of(owner, reference_steps=2), run_of(owner, reference_steps=2)
    go_on(run, 3)
    go_on(other, 3, scale=10.0)
    saved = (other if another else run).save()
    if not another:
        go_on(run, 3, scale=10.0)
    run.write_back(saved, raw=raw, in_place=in_place)
    go_on(run)


# Bit for bit


def shown(optimizer) -> tuple:
    schedule = schedule_of(optimizer)
    decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
    return schedule.grad_rms, schedule.step_count, decays


def check_resume(run: LockStep, steps: int, missing=lambda step: (), scale=lambda step: 0.1 + step % 5) -> None:
    """A fresh optimizer with the checkpoint of the run, beside the run itself."""
    resumed = run.fresh_optimizer()
    resumed.load_state_dict(through_file(run.optimizer.state_dict()))
    assert shown(run.optimizer) == shown(resumed)
    for step in range(steps):
        gradients = run.gradients(lambda i, _, step=step: i in missing(step), scale=scale(step))
        for optimizer in (run.optimizer, resumed):
            for group, grads in zip(optimizer.param_groups, gradients, strict=True):
                for p, g in zip(group["params"], grads, strict=True):
                    p.grad = None if g is None else g.clone()
            optimizer.step()
        assert shown(run.optimizer) == shown(resumed), f"step {step}"
        for mine, theirs in zip(run.groups, resumed.param_groups, strict=True):
            for p, q in zip(mine["params"], theirs["params"], strict=True):
                assert same_bits(p, q), f"step {step}"


DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "complex64": torch.complex64,
}  # fmt: skip
COMBINATIONS = [
    (dtype, kernel) for dtype in DTYPES for kernel in KERNELS if not (dtype == "complex64" and kernel == "fused")
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference_steps": 3},
        {"reference_steps": 12},
        {"amsgrad": True},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 0.5, "unclipped_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("missing", [lambda step: (), sometimes], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize(("dtype", "kernel"), COMBINATIONS)
@owners
def test_resume_is_the_uninterrupted_run_bit_for_bit(owner, dtype, kernel, missing, options):
    """As with torch's AdamW: weights, and what is logged."""
    groups = [
        {"params": params(dtype=DTYPES[dtype])},
        {"params": params((2, 2), (), dtype=DTYPES[dtype]), "weight_decay": 0.05},
    ]
    run = run_of(owner, groups, path=KERNELS[kernel], **options)
    for step in range(7):
        run.set_gradients(run.gradients(lambda i, _, step=step: i in missing(step), scale=0.1 + step))
        run.optimizer.step()
    check_resume(run, 13, missing)


@every_kernel
@owners
def test_moments_that_overflowed_are_resumed_bit_for_bit(owner, path):
    """A gradient of 1e21 makes `exp_avg_sq` infinite in float32, after which Adam leaves that weight alone."""
    run = run_of(owner, [{"params": params(dtype=torch.float32)}], path=path)
    for step in range(4):
        gradients = run.gradients()
        if step == 2:
            gradients[0][0][0, 0] = 1e21
        run.set_gradients(gradients)
        run.optimizer.step()
    assert not run.optimizer.state[run.params[0]]["exp_avg_sq"].isfinite().all()
    check_resume(run, 4)
    assert all(p.isfinite().all() for p in run.params)


@every_kernel
@owners
def test_moments_that_overflowed_under_adamw_do_not_destroy_the_weights(owner, path):
    """The true sum is lost; what is left of it is infinite, and does not decay."""
    run = run_of(owner, [{"params": params(dtype=torch.float32)}], path=path)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in run.groups], **path)
    gradients = run.gradients()
    gradients[0][0][0, 0] = 1e21
    run.set_gradients(gradients)
    adamw.step()
    run.optimizer.load_state_dict(adamw.state_dict())
    run.set_gradients(run.gradients())
    run.optimizer.step()
    assert all(p.isfinite().all() for p in run.params)


@owners
def test_adamw_runs_a_checkpoint_with_the_users_lambda(owner):
    """Its steps are those of an AdamW that was built with it."""
    run = run_of(owner, reference_steps=2)
    go_on(run, scale=10.0)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in run.groups], lr=0.5, weight_decay=0.9)
    adamw.load_state_dict(run.save("file").state_dict)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.01, 0.05]
    gradients = run.gradients()
    run.set_gradients(gradients)
    adamw.step()
    run.reference.adamw_step(gradients)
    for p, q in zip(run.params, (p for group in run.reference.groups for p in group["params"]), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


@every_kernel
@owners
def test_amsgrad_in_float16_whose_moments_underflow(owner, path):
    """(1 - beta2) g^2 of gradients of 1e-4 is 1e-11, and float16 ends at 6e-8: moments and maxima are 0, and what is
    left for the mean is the gradient of the step."""
    run = run_of(owner, [{"params": params(dtype=torch.float16)}], path=path, amsgrad=True)
    for step in range(1, 7):
        run.set_gradients(run.gradients(scale=1e-4))
        squares = sum(p.grad.double().square().sum().item() for p in run.params)
        run.optimizer.step()
        mean = 0.001 * squares / sum(p.numel() for p in run.params) / (1 - 0.999**step)
        assert math.isclose(run.schedule.grad_rms, math.sqrt(mean), rel_tol=1e-3), step
    assert all(not run.optimizer.state[p]["max_exp_avg_sq"].any() for p in run.params)


# torchao's step goes through torch.compile.
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
def test_step_of_torchao_is_compiled_once():
    """Not for each decay anew."""
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    weight = Parameter(torch.randn(64, 128))
    optimizer = AdamW8bit([weight], lr=1e-2, weight_decay=1e-2)
    schedule, decays = ScheduledWeightDecay(optimizer), []
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
        warnings.simplefilter("ignore")
        for number in range(4):
            weight.grad = torch.randn(weight.shape) * (0.1 + number)
            optimizer.step()
            decays.append(float(optimizer.param_groups[0]["weight_decay"]))
    assert decays[-1] == pytest.approx(1e-2 / schedule.grad_rms) and len(set(decays)) == 4


@needs_compiler
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_low_bit_adamw_of_torchao_resumes_exactly(name):
    """Whose moments are quantised: the schedule's number is its own truth."""
    pytest.importorskip("torchao")
    import torchao.optim

    def build(weights):
        optimizer = getattr(torchao.optim, name)([Parameter(w.clone()) for w in weights], lr=1e-2, weight_decay=1e-2)
        ScheduledWeightDecay(optimizer)
        return optimizer

    def step(optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator) * (0.1 + number % 3)
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's, of torchao's own step
        straight = build([torch.randn(64, 128), torch.randn(7)])  # the second is kept in float32
        mean = 0.0
        for number in range(4):
            step(straight, number)
            grads = [p.grad.double().flatten() for p in straight.param_groups[0]["params"]]
            mean = 0.999 * mean + 0.001 * torch.cat(grads).square().mean().item()
        assert math.isclose(shown(straight)[0], math.sqrt(mean / (1 - 0.999**4)), rel_tol=1e-6)
        weights = [p.detach() for p in straight.param_groups[0]["params"]]
        resumed = build(weights)
        resumed.load_state_dict(through_file(straight.state_dict(), weights_only=False))
        for number in range(4, 9):
            step(straight, number)
            step(resumed, number)
            assert shown(straight) == shown(resumed), number
        for p, q in zip(weights, resumed.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
