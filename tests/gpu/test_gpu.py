"""What only a CUDA device can show: no host synchronisation, graph capture, memory, torch's CUDA kernels.

Run by `scripts/gpu_check.sh`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from lockstep import HYPER
from reference_adams import ReferenceAdamS
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay


pytestmark = pytest.mark.gpu

SHAPES = ((300, 100), (64,), (), (5000,), (3, 5, 7))
MAX_NORM = 0.5
PATHS = {"fused": {}, "foreach": {"foreach": True}, "forloop": {"foreach": False, "fused": False}}


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape, dtype=dtype, device="cuda")) for shape in SHAPES]


def set_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for p in params:
        grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cuda")
        if p.grad is None:
            p.grad = grad.to(p.dtype)
        else:
            p.grad.copy_(grad)


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def clip_and_step(optimizer: AdamS, clipping: str | None) -> None:
    if clipping is not None:
        optimizer.clip_grad_norm_(MAX_NORM)
    optimizer.step()


@pytest.mark.parametrize("clipping", [None, "in_place", "deferred"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_equals_the_reference(dtype, rtol, path, clipping):
    params = parameters(dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer, reference = AdamS([dict(g) for g in groups], **HYPER, **path), ReferenceAdamS(groups, **HYPER)
    for step in range(30):
        set_gradients(params, step)
        grads = [p.grad.double() for p in params]
        if clipping is not None:
            total = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            grads = [g * min(1.0, MAX_NORM / (total + 1e-6)) for g in grads]
        clip_and_step(optimizer, clipping)
        reference.step([grads[:2], grads[2:]])
    assert optimizer.grad_rms == pytest.approx(reference.grad_rms, rel=1e-6 if dtype == torch.float32 else 1e-12)
    expected = [p for group in reference.groups for p in group["params"]]
    for p, q in zip(params, expected, strict=True):
        assert ((p.double() - q).abs().max() / q.abs().max()).item() < rtol


@pytest.mark.parametrize(
    ("clipping", "unclipped_norm"),
    [(None, False), ("in_place", False), ("deferred", False), ("in_place", True), ("deferred", True)],
)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_step_does_not_make_the_host_wait(path, clipping, unclipped_norm):
    params = parameters()
    # The for-loop implementation of torch's Adam asks for the step count unless it is to be captured.
    optimizer = AdamS(params, capturable="fused" in path, unclipped_norm=unclipped_norm, **HYPER, **path)
    for step in range(3):
        set_gradients(params, step)
        clip_and_step(optimizer, clipping)
    set_gradients(params, 3)
    with no_synchronization():
        clip_and_step(optimizer, clipping)


@pytest.mark.parametrize("clipping", [None, "in_place", "deferred"])
@pytest.mark.parametrize("path", [{}, {"foreach": True}], ids=["fused", "foreach"])
def test_captured_graph_equals_eager_steps(path, clipping):
    def build() -> tuple[list[Parameter], AdamS]:
        params = parameters()
        return params, AdamS(params, capturable=True, reference_steps=4, **HYPER, **path)

    (params, optimizer), (twins, eager) = build(), build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            set_gradients(params, step)
            clip_and_step(optimizer, clipping)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clip_and_step(optimizer, clipping)
    for step in range(10):
        if step >= 3:
            set_gradients(params, step)
            graph.replay()
        set_gradients(twins, step)
        clip_and_step(eager, clipping)
    assert optimizer.grad_rms == pytest.approx(eager.grad_rms, rel=1e-6)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_peak_memory_is_that_of_fused_adamw():
    def peak(build) -> int:
        params = [Parameter(torch.ones(1 << 22, device="cuda")) for _ in range(4)]
        optimizer = build(params)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before

    adamw = peak(lambda params: torch.optim.AdamW(params, fused=True))
    assert peak(AdamS) <= adamw + 64 * 1024  # a few dozen scalars, each rounded up to 512 bytes


def test_skipped_step_of_a_grad_scaler_changes_nothing():
    params = parameters()
    optimizer, scaler = AdamS(params, **HYPER), torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    for step, overflow in enumerate([False, True, False]):
        set_gradients(params, step)
        for p in params:
            p.grad *= scaler.get_scale()
        if overflow:
            params[0].grad[0, 0] = torch.inf
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) == overflow
    assert optimizer.schedule.step_count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_as_close_as_the_host_decay(dtype):
    """The decay that stays on the device against one that torch's kernel gets as a number."""
    params, twins = parameters(dtype), parameters(dtype)
    optimizer, adamw = AdamS(params, **HYPER), torch.optim.AdamW(twins, fused=True, **HYPER)
    ScheduledWeightDecay(adamw)
    for step in range(20):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        adamw.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_trainer_on_the_device(tmp_path):
    from hf_utils import arguments, sentences, tiny_bert
    from transformers import Trainer

    from hf_swd import SWDTrainer

    def weights(cls: type) -> torch.Tensor:
        trainer = cls(tiny_bert(), arguments(tmp_path, use_cpu=False, max_grad_norm=0.1), train_dataset=sentences())
        trainer.train()
        assert {"swd/weight_decay", "swd/grad_rms"} <= trainer.state.log_history[0].keys()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    torch.testing.assert_close(weights(SWDTrainer), weights(Trainer), rtol=1e-4, atol=1e-6)
