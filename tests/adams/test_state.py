"""Whatever carries an AdamS (copy, pickle, state_dict, a file, an AdamW, torch's DCP) goes on exactly where it was."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from lockstep import HYPER, PATHS, LockStep, parameters, through_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter


every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
SCHEDULE_KEYS = {
    "weight_decay": float,
    "initial_weight_decay": float,
    "scheduled_weight_decay": float,
    "reference_steps": int,
    "schedule_step": int,
    "second_moment_mean": float,
    "reference_rms": float,
}


def often_missing(i: int, step: int) -> bool:
    return i == 0 or (step + i) % 3 == 0


def never_missing(i: int, step: int) -> bool:
    return False


def two_groups(dtype: torch.dtype = torch.float64) -> list[dict]:
    return [
        {"params": parameters(dtype=dtype)},
        {"params": parameters(((4,), (2, 2)), dtype), "lr": 3e-2, "weight_decay": 0.03, "betas": (0.8, 0.99)},
    ]


def through_json(state_dict: dict) -> dict:
    """Groups through JSON, as engines and trackers write them; tensors as they are."""
    return {
        "state": copy.deepcopy(state_dict["state"]),
        "param_groups": json.loads(json.dumps(state_dict["param_groups"])),
    }


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "state_dict": LockStep.resumed,
    "file": lambda pair: pair.resumed(through_file),
    "json": lambda pair: pair.resumed(through_json),
}


@pytest.mark.parametrize("missing", [never_missing, often_missing], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"amsgrad": True}, {"reference_steps": 4}, {"reference_steps": 9}],
    ids=["plain", "amsgrad", "after_reference_step", "before_reference_step"],
)  # fmt: skip
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@every_path
def test_copy_goes_on_exactly(path, way, kwargs, missing):
    pair = LockStep(two_groups(), path=path, **kwargs)
    pair.run(7, missing)

    other = way(pair)

    other.run(8, missing)
    pair.run(8, missing)  # and stepping the copy has not touched the original


def test_resumed_twice_and_before_the_first_step():
    pair = LockStep(two_groups(), reference_steps=3)

    pair = pair.resumed()  # accelerate round-trips the empty state when it wraps an optimizer
    pair.run(2)
    pair = pair.resumed().resumed()
    pair.run(3)
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    pair.run(3)


def test_going_back_to_an_earlier_checkpoint():
    pair = LockStep(two_groups(), reference_steps=3)
    pair.run(5)
    checkpoint = copy.deepcopy((pair.optimizer.state_dict(), [p.detach() for p in pair.params], pair.reference))
    pair.run(5)

    state_dict, weights, pair.reference = checkpoint
    with torch.no_grad():
        for p, old in zip(pair.params, weights, strict=True):
            p.copy_(old)
    pair.optimizer.load_state_dict(state_dict)

    pair.run(5)


def test_loading_shows_the_schedule_before_the_next_step():
    pair = LockStep(two_groups(), reference_steps=3)
    pair.run(5)

    other = pair.resumed().optimizer

    assert other.grad_rms == pair.optimizer.grad_rms > 0
    assert other.schedule.step_count == 5
    assert [g["weight_decay"] for g in other.param_groups] == [g["weight_decay"] for g in pair.optimizer.param_groups]


@pytest.mark.parametrize("steps", [0, 2, 6])
@every_path
def test_group_values_are_plain_numbers(path, steps):
    pair = LockStep(two_groups(), path=path, reference_steps=4)
    pair.run(steps)

    groups = pair.optimizer.state_dict()["param_groups"]

    for group in groups:
        assert {key: type(group[key]) for key in SCHEDULE_KEYS} == SCHEDULE_KEYS
        assert json.loads(json.dumps(group))["second_moment_mean"] == group["second_moment_mean"]
        assert (group["schedule_step"], group["reference_steps"]) == (steps, 4)
        assert group["weight_decay"] == group["scheduled_weight_decay"]
        assert (group["reference_rms"] > 0) == (steps >= 4)
    assert [group["initial_weight_decay"] for group in groups] == [HYPER["weight_decay"], 0.03]


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded_state_is_equal(weights_only):
    pair = LockStep(two_groups(), reference_steps=2)
    pair.run(5)
    state_dict = pair.optimizer.state_dict()

    loaded = through_file(state_dict, weights_only)

    assert loaded["param_groups"] == state_dict["param_groups"]
    torch.testing.assert_close(loaded["state"], state_dict["state"], rtol=0, atol=0)


def test_load_leaves_the_given_state_dict_alone():
    pair = LockStep(two_groups(), reference_steps=3)
    pair.run(5)
    state_dict = copy.deepcopy(pair.optimizer.state_dict())
    kept = copy.deepcopy(state_dict)

    other = pair.resumed(lambda _: state_dict)
    other.set_weight_decay(0, 0.7)

    assert state_dict["param_groups"] == kept["param_groups"]
    torch.testing.assert_close(state_dict["state"], kept["state"], rtol=0, atol=0)


def reference_state(optimizer: torch.optim.Optimizer, p: Parameter) -> dict:
    """What the reference keeps for a parameter, from an AdamW's state."""
    state, zeros = optimizer.state.get(p, {}), torch.zeros_like(p, requires_grad=False)
    names = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
    return {"t": int(state.get("step", 0)), **{name: state.get(key, zeros).clone() for name, key in names.items()}}


class TestAdamW:
    """torch.optim.AdamW's state can be taken over, and AdamS's given to it."""

    @pytest.mark.parametrize("missing", [never_missing, often_missing], ids=["all_gradients", "missing_gradients"])
    @pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"reference_steps": 3}], ids=["plain", "amsgrad", "K3"])
    @every_path
    def test_takes_over_its_moments_and_keeps_its_own_lambda(self, path, kwargs, missing):
        pair = LockStep(two_groups(), path=path, **kwargs)
        twin = torch.optim.AdamW(
            [
                {**over, "params": group["params"]}
                for over, group in zip(pair.overrides, pair.optimizer.param_groups, strict=True)
            ],
            lr=HYPER["lr"], weight_decay=0.5, amsgrad=kwargs.get("amsgrad", False),
        )  # fmt: skip
        for _ in range(10):
            pair.set_gradients(pair.gradients(missing))
            twin.step()

        pair.optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))

        for mine, group in zip(pair.optimizer.param_groups, pair.reference.groups, strict=True):
            group["params"] = [p.detach().clone() for p in mine["params"]]
            group["state"] = [reference_state(twin, p) for p in mine["params"]]
        lambdas = [group["initial_weight_decay"] for group in pair.optimizer.param_groups]
        assert lambdas == [HYPER["weight_decay"], 0.03]
        pair.run(10, missing)

    def test_loads_the_state_of_adams(self):
        pair = LockStep(two_groups())
        pair.run(5)
        other = pair.fresh_optimizer()
        adamw = torch.optim.AdamW([{"params": group["params"]} for group in other.param_groups])

        adamw.load_state_dict(pair.optimizer.state_dict())

        assert [group["weight_decay"] for group in adamw.param_groups] == [HYPER["weight_decay"], 0.03]
        before = {p: p.detach().clone() for group in adamw.param_groups for p in group["params"]}
        for p in before:
            p.grad = torch.randn_like(p)
        adamw.step()
        for group in adamw.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m, v = (adamw.state[p][key] for key in ("exp_avg", "exp_avg_sq"))
                update = m / (1 - beta1**6) / ((v / (1 - beta2**6)).sqrt() + group["eps"])
                expected = (1 - lr * group["weight_decay"]) * before[p] - lr * update
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


class TestDistributedCheckpoint:
    """torch's DCP makes the state of an optimizer by a step with zero gradients and lr 0."""

    @staticmethod
    def setup(path, **kwargs):
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).double()
        return model, LockStep([{"params": list(model.parameters())}], path=path, **kwargs)

    @staticmethod
    def check_untouched(model, optimizer, before):
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        group = optimizer.param_groups[0]
        assert (optimizer.grad_rms, optimizer.schedule.step_count) == (0.0, 0)
        assert (group["weight_decay"], group["initial_weight_decay"]) == (0.0, HYPER["weight_decay"])
        assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == HYPER["weight_decay"]

    @pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
    @every_path
    def test_dummy_step_leaves_schedule_and_weights(self, path, reference_steps):
        model, pair = self.setup(path, reference_steps=reference_steps)
        before = copy.deepcopy(model.state_dict())

        get_optimizer_state_dict(model, pair.optimizer)

        self.check_untouched(model, pair.optimizer, before)

    @pytest.mark.parametrize("path", [PATHS["default"], PATHS["forloop"]], ids=["default", "forloop"])
    def test_dummy_step_with_tensor_lr(self, path):
        model, pair = self.setup(path, lr=torch.tensor(1e-2, dtype=torch.float64))
        before = copy.deepcopy(model.state_dict())

        get_optimizer_state_dict(model, pair.optimizer)

        self.check_untouched(model, pair.optimizer, before)

    @pytest.mark.parametrize("resume", [False, True], ids=["straight", "resumed"])
    @pytest.mark.parametrize("reference_steps", [0, 2], ids=lambda k: f"K{k}")
    @every_path
    def test_training_after_the_dummy_step(self, path, reference_steps, resume):
        """Adam's own step count is one ahead from then on (torch.optim.AdamW's, too), and with it v_hat; the
        calibration's is not."""
        model, pair = self.setup(path, reference_steps=reference_steps)
        get_optimizer_state_dict(model, pair.optimizer)
        for state in pair.reference.groups[0]["state"]:
            state["t"] = 1

        pair.run(3)
        if resume:
            pair = pair.resumed()
        pair.run(3)

    @every_path
    def test_saved_and_loaded_into_a_fresh_run(self, path):
        model, pair = self.setup(path, reference_steps=3)
        pair.run(5)
        saved = copy.deepcopy(get_optimizer_state_dict(model, pair.optimizer))

        other_model = copy.deepcopy(model)
        other = copy.copy(pair)
        other.optimizer = pair.build([{"params": list(other_model.parameters())}])
        other.reference = copy.deepcopy(pair.reference)
        set_optimizer_state_dict(other_model, other.optimizer, saved)

        other.run(5)


class TestHooks:
    """Step hooks run exactly once, which fails when step() calls the step() of a class that torch has wrapped too."""

    @staticmethod
    def counted(optimizer):
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        return calls

    @pytest.mark.parametrize(
        "way", [WAYS["deepcopy"], WAYS["pickle"], WAYS["state_dict"]], ids=["deepcopy", "pickle", "state_dict"]
    )
    def test_run_once_in_a_copy(self, way):
        torch.optim.AdamW([torch.zeros(1)]), torch.optim.Adam([torch.zeros(1)])
        pair = LockStep()
        pair.run(1)
        other = way(pair)
        calls, others = self.counted(pair.optimizer), self.counted(other.optimizer)

        other.run(1)
        assert (calls, others) == ([], ["pre", "post"])
        pair.run(1)
        assert (calls, others) == (["pre", "post"], ["pre", "post"])

    def test_run_once_whatever_else_was_built_before_or_after(self):
        code = """
            import copy, pickle, torch
            from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
            from hf_swd import AdamS

            calls = []
            register_optimizer_step_pre_hook(lambda *_: calls.append("global pre"))
            register_optimizer_step_post_hook(lambda *_: calls.append("global post"))

            def check(optimizer):
                optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
                optimizer.register_step_post_hook(lambda *_: calls.append("post"))
                optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
                calls.clear()
                optimizer.step()
                assert calls == ["global pre", "pre", "post", "global post"], calls

            check(AdamS([torch.ones(2)]))
            torch.optim.AdamW([torch.ones(2)])
            check(AdamS([torch.ones(2)]))
            torch.optim.Adam([torch.ones(2)])
            check(AdamS([torch.ones(2)]))
            check(copy.deepcopy(AdamS([torch.ones(2)])))
            check(pickle.loads(pickle.dumps(AdamS([torch.ones(2)]))))
            check(type("Derived", (AdamS,), {})([torch.ones(2)]))
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)

    def test_pre_hook_may_change_the_gradients(self):
        pair = LockStep()

        def halve(optimizer, args, kwargs):
            for p in pair.params:
                p.grad.mul_(0.5)

        pair.optimizer.register_step_pre_hook(halve)
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        pair.optimizer.step()
        pair.step_reference([[g * 0.5 for g in gradients[0]]])


def test_copy_and_original_share_nothing():
    pair = LockStep(reference_steps=2)
    pair.run(3)
    before = copy.deepcopy(pair.optimizer.state_dict())

    other = copy.deepcopy(pair)
    other.run(3)

    assert other.optimizer.schedule is not pair.optimizer.schedule
    assert pair.optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert other.optimizer.schedule.step_count == 6 != pair.optimizer.schedule.step_count
