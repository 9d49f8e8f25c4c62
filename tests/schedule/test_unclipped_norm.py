"""`unclipped_norm=True`: the schedule follows the gradients before clipping, Adam's moments those after it."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_utils import arguments, sentences, tiny_bert
from lockstep import HYPER, PATHS, LockStep, parameters
from transformers import Trainer

from hf_swd import AdamS, ScheduledWeightDecay, SWDTrainer
from hf_swd.core.schedule import schedule_of


MAX_NORM = 0.5  # of gradients whose norm lies between 0.3 and 1.5


class Clipped(LockStep):
    """Both optimizers get gradients clipped to `MAX_NORM`; the reference is told what they were before."""

    def __init__(self, groups=None, *, defer=False, **kwargs):
        super().__init__(groups, unclipped_norm=True, **kwargs)
        self.defer = defer
        self.clipped = 0

    def clip(self):
        options = {"defer": True} if self.defer else {}
        self.optimizer.clip_grad_norm_(MAX_NORM, **options)

    def step(self, gradients=None, *, call=None, scale=1.0):
        gradients = self.gradients() if gradients is None else gradients
        self.set_gradients(gradients, scale)
        self.clip()
        (call or self.optimizer.step)()
        norm = sum(g.double().square().sum().item() for group in gradients for g in group if g is not None) ** 0.5
        factor = min(1.0, MAX_NORM / (norm + 1e-6))
        self.clipped += factor < 1
        clipped = [[None if g is None else g.double() * factor for g in group] for group in gradients]
        self.reference.step(clipped, gradients)
        self.compare()


def two_groups():
    return [{"params": parameters()}, {"params": parameters(((6,), (2, 2))), "weight_decay": 3e-2}]


def sometimes(i, step):
    return (i + step) % 3 == 0


@pytest.mark.parametrize("defer", [False, True], ids=["clipped", "deferred"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
class TestAgainstTheReference:
    def test_two_groups(self, path, defer):
        pair = Clipped(two_groups(), path=path, defer=defer)
        pair.run(30)
        assert 5 < pair.clipped < 30

    def test_in_fp32_with_missing_gradients(self, path, defer):
        pair = Clipped([{"params": parameters(dtype=torch.float32)}], path=path, defer=defer)
        pair.run(20, sometimes)

    def test_reference_steps(self, path, defer):
        pair = Clipped(path=path, defer=defer, reference_steps=5)
        pair.run(15)

    def test_amsgrad_does_not_enter_the_schedule(self, path, defer):
        pair = Clipped(path=path, defer=defer, amsgrad=True)
        pair.run(20)


def test_it_matters():
    """The very same clipped steps give another decay than the schedule of the clipped gradients."""
    decays = []
    for unclipped_norm in (False, True):
        torch.manual_seed(0)
        pair = LockStep(unclipped_norm=unclipped_norm)
        for _ in range(10):
            pair.set_gradients(pair.gradients())
            pair.optimizer.clip_grad_norm_(MAX_NORM / 2)
            pair.optimizer.step()
        decays.append(pair.optimizer.param_groups[0]["weight_decay"])
    assert decays[1] < 0.7 * decays[0]


def test_schedule_on_adamw():
    params, own = parameters(), parameters()
    for mine, p in zip(own, params, strict=True):
        mine.data.copy_(p.data)
    adams = AdamS(params, unclipped_norm=True, **HYPER)
    adamw = torch.optim.AdamW(own, **HYPER)
    schedule = ScheduledWeightDecay(adamw, unclipped_norm=True)
    for _ in range(8):
        for p, mine in zip(params, own, strict=True):
            p.grad = torch.randn_like(p)
            mine.grad = p.grad.clone()
        for clipper, optimizer in ((adams, adams), (schedule, adamw)):
            clipper.clip_grad_norm_(MAX_NORM)
            optimizer.step()
    assert all(torch.allclose(p, mine, rtol=1e-12) for p, mine in zip(params, own, strict=True))


def test_with_a_grad_scaler_that_unscales_after_clipping_has_been_measured():
    """torch's fused step divides by `grad_scale` itself; the norm before clipping is divided as well."""
    pair = LockStep([{"params": parameters(dtype=torch.float32)}], unclipped_norm=True, path={"fused": True})
    for _ in range(5):
        gradients = pair.gradients()
        pair.set_gradients(gradients, scale=1024.0)
        pair.optimizer.clip_grad_norm_(1e9)
        pair.optimizer.grad_scale = torch.tensor(1024.0)
        pair.optimizer.found_inf = torch.tensor(0.0)
        pair.optimizer.step()
        del pair.optimizer.grad_scale, pair.optimizer.found_inf
        pair.step_reference(gradients)


class TestCheckpoints:
    def test_resume_goes_on_exactly(self):
        pair = Clipped(two_groups())
        pair.run(12)
        resumed = pair.resumed()
        resumed.run(12)

    def test_resume_of_the_schedule_on_adamw(self):
        params = parameters()
        optimizer = torch.optim.AdamW(params, **HYPER)
        schedule = ScheduledWeightDecay(optimizer, unclipped_norm=True)

        def step(params, optimizer, schedule, seed):
            torch.manual_seed(seed)
            for p in params:
                p.grad = torch.randn_like(p)
            schedule.clip_grad_norm_(MAX_NORM)
            optimizer.step()

        for seed in range(6):
            step(params, optimizer, schedule, seed)
        others = copy.deepcopy(params)
        other = torch.optim.AdamW(others, **HYPER)
        other_schedule = ScheduledWeightDecay(other)
        other_schedule.load_state_dict(schedule.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which else share their moments
        assert other_schedule.unclipped_norm
        for seed in range(6, 12):
            step(params, optimizer, schedule, seed)
            step(others, other, other_schedule, seed)
            assert other_schedule.grad_rms == pytest.approx(schedule.grad_rms, rel=1e-12)

    def test_gradients_missing_at_the_last_step(self):
        pair = Clipped()
        pair.run(11, lambda i, step: i == 1 and step == 11)
        pair.resumed().run(3)

    def test_checkpoint_brings_its_own_setting(self):
        saved = Clipped()
        saved.run(3)
        fresh = AdamS(copy.deepcopy(saved.params), **HYPER)
        fresh.load_state_dict(saved.optimizer.state_dict())
        assert fresh.schedule.unclipped_norm

    def test_adamws_checkpoint_does_not(self):
        params = parameters()
        adamw = torch.optim.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        adamw.step()
        fresh = AdamS(copy.deepcopy(params), unclipped_norm=True, **HYPER)
        fresh.load_state_dict(adamw.state_dict())
        assert fresh.schedule.unclipped_norm


class TestRefusal:
    CHANGES = {
        "not_clipped": lambda optimizer, params: None,
        "clipped_by_torch": lambda optimizer, params: torch.nn.utils.clip_grad_norm_(params, MAX_NORM),
        "changed_after_clipping": lambda optimizer, params: (
            optimizer.clip_grad_norm_(MAX_NORM),
            params[0].grad.mul_(2),
        ),
    }

    @pytest.mark.parametrize("clip", CHANGES.values(), ids=CHANGES)
    def test_norm_that_is_not_known_stops_before_a_weight_changes(self, clip):
        params = parameters()
        optimizer = AdamS(params, unclipped_norm=True, **HYPER)
        for p in params:
            p.grad = torch.randn_like(p)
        clip(optimizer, params)
        before = copy.deepcopy(params)
        with pytest.raises(
            RuntimeError, match=r"unclipped_norm=True: .*clip_grad_norm_.*a Trainer does.*leave unclipped_norm out"
        ):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert optimizer.schedule.step_count == 0

    def test_zero_gradients_are_known(self):
        """By such steps torch.distributed.checkpoint makes an optimizer allocate its state."""
        params = parameters()
        optimizer = AdamS(params, unclipped_norm=True, **{**HYPER, "lr": 0.0})
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()

    @pytest.mark.parametrize("build", [AdamS, lambda p, **kw: ScheduledWeightDecay(torch.optim.AdamW(p), **kw)])
    def test_not_a_flag(self, build):
        with pytest.raises(TypeError, match="unclipped_norm='yes': expected one of True, False"):
            build(parameters(), unclipped_norm="yes")


class TestTrainer:
    def train(self, output_dir, cls, **changes):
        args = arguments(output_dir, **{"optim_args": "unclipped_norm=true", "max_grad_norm": 0.1, **changes})
        trainer = cls(tiny_bert(), args, train_dataset=sentences())
        trainer.train()
        return trainer

    @pytest.mark.parametrize("cls", [Trainer, SWDTrainer])
    @pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
    def test_norm_before_clipping_is_followed(self, tmp_path, cls, max_grad_norm):
        """Both norms are one without clipping; with it, grad_rms is what an unclipped Trainer's would be at step 1."""
        if max_grad_norm == 0 and not hasattr(Trainer, "_get_grad_norm"):
            pytest.skip("before transformers 5.3 a Trainer measures only what it clips")
        first = {"max_steps": 1}
        trainer = self.train(tmp_path, cls, max_grad_norm=max_grad_norm, **first)
        usual = self.train(tmp_path, Trainer, optim_args="", max_grad_norm=0.0, **first)
        assert schedule_of(trainer.optimizer).grad_rms == pytest.approx(
            schedule_of(usual.optimizer).grad_rms, rel=1e-6
        )

    def test_it_does_not_warn_of_constant_decay(self, tmp_path, caplog):
        self.train(tmp_path, Trainer, max_steps=24)
        assert not [r for r in caplog.records if "clipped to max_grad_norm" in r.getMessage()]

    @pytest.mark.skipif(not hasattr(Trainer, "_clip_grad_norm"), reason="clips inline before transformers 5.3")
    def test_trainer_that_clips_by_itself_is_refused(self, tmp_path):
        class ClipsByItself(Trainer):
            def _clip_grad_norm(self, model):
                return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

        with pytest.raises(RuntimeError, match="does not know the norm"):
            self.train(tmp_path, ClipsByItself)
