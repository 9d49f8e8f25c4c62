"""Two processes that hold disjoint parts of a model take the steps that one process with all of it takes."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference_adams import ReferenceAdamS

from hf_swd import AdamS


SHAPES = (((5, 3), (7,)), ((4, 2), (), (0, 3)))  # of the parameters that ranks 0 and 1 hold
STEPS = 12
MAX_NORM = 0.5
HYPER = {"lr": 1e-2, "weight_decay": 1e-2}
CASES = {  # arguments of AdamS; whether to clip
    "plain": ({}, False),
    "amsgrad_reference_steps": ({"amsgrad": True, "reference_steps": 3}, False),
    "clipped": ({"foreach": True}, True),
}


def weights(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[rank]]


def gradients(rank: int, step: int) -> list[torch.Tensor | None]:
    """Single gradients are missing on both ranks, and at every fourth step rank 1 has none at all."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    grads = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 * (1 + step % 3) for shape in SHAPES[rank]
    ]
    if rank == 1 and step % 4 == 0:
        return [None] * len(grads)
    return [None if (i + step) % 5 == 0 else g for i, g in enumerate(grads)]


def train(rank: int, kwargs: dict, clip: bool) -> list[tuple]:
    params = [torch.nn.Parameter(w) for w in weights(rank)]
    optimizer = AdamS(params, process_group=dist.group.WORLD, **HYPER, **kwargs)
    records = []
    for step in range(1, STEPS + 1):
        for p, g in zip(params, gradients(rank, step), strict=True):
            p.grad = g
        norm = optimizer.clip_grad_norm_(MAX_NORM).item() if clip else 0.0
        optimizer.step()
        decay = optimizer.param_groups[0]["weight_decay"]
        records.append(([p.detach().clone() for p in params], optimizer.grad_rms, decay, norm))
    return records


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save({name: train(rank, *case) for name, case in CASES.items()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, list[tuple]]]:
    folder = tmp_path_factory.mktemp("two_processes")
    context = mp.spawn(worker, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the workers hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_disjoint_halves_equal_one_process(runs, case):
    kwargs, clip = CASES[case]
    kwargs = {key: value for key, value in kwargs.items() if key != "foreach"}
    reference = ReferenceAdamS([{"params": weights(0) + weights(1)}], **HYPER, **kwargs)
    rtol = 1e-6 if clip else 1e-12  # clip_grad_norm_ goes through a float32 norm
    for step in range(1, STEPS + 1):
        grads = gradients(0, step) + gradients(1, step)
        total = sum(g.square().sum().item() for g in grads if g is not None) ** 0.5
        factor = min(1.0, MAX_NORM / (total + 1e-6)) if clip else 1.0
        reference.step([[None if g is None else g * factor for g in grads]])
        (mine, *numbers), (others, *others_numbers) = (run[case][step - 1] for run in runs)

        assert numbers == others_numbers  # the same bits: the ranks never drift apart
        rms, decay, norm = numbers
        assert rms == pytest.approx(reference.grad_rms, rel=rtol)
        assert decay == pytest.approx(reference.groups[0]["decay"], rel=rtol)
        assert norm == (pytest.approx(total, rel=1e-6) if clip else 0.0)
        torch.testing.assert_close(mine + others, reference.groups[0]["params"], rtol=rtol, atol=rtol)
