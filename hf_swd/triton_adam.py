"""AdamW with a weight decay that is read from the device, over many tensors in one Triton kernel.

torch's fused AdamW takes the decay from the host. Multiplying the weights first, in a kernel of its own, costs two more words per
parameter; this kernel moves the seven that AdamW needs. Triton is optional, and imported when it is first asked for.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


__all__ = ["adamw_", "is_available"]

_BLOCK = 2048  # elements per program: 8 per thread, which is one 16-byte access of half precision or two of float32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

# Host memory that captured CUDA graphs copy from at every replay: it must outlive them, and nobody tells when they are gone. 64 bytes
# per tensor and captured step.
_captured: dict[bytes, Tensor] = {}

tl: Any = None  # triton.language, which the kernels below look up here


def is_available(device: torch.device) -> bool:
    """
    Whether [`adamw_`] runs on a device. The first call for a CUDA device runs a step of one element there, which compiles the kernel.

    Args:
        device (`torch.device`): where the parameters are: a CUDA device, or the CPU where TRITON_INTERPRET=1 is set (for tests).

    Returns:
        `bool`: False where Triton is missing or does not work (a missing C compiler, an old GPU), and during the capture of a CUDA
        graph where no earlier call has found out.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return False
    if interpreted:
        return _imports()
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        if index not in _works and not torch.cuda.is_current_stream_capturing():
            _works[index] = _imports() and torch.cuda.get_device_capability(index) >= (8, 0) and _runs(index)
    return _works.get(index, False)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    decay: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """
    One AdamW step, as torch's fused one but with the decay on the device. Computes in float32, for float64 parameters in float64. The
    host never waits for the device.

    Args:
        params, grads, exp_avgs, exp_avg_sqs (`Sequence[Tensor]`): float32, bfloat16, float16 or float64 in any mix; without gaps or
            overlaps in memory, and with the same strides in all of them.
        max_exp_avg_sqs (`Sequence[Tensor]`): the same for `amsgrad`, else not read.
        state_steps (`Sequence[Tensor]`): 0-d step counts, on the devices of their parameters; incremented first.
        decay (`Tensor` of one element): the weights are multiplied by `1 - lr * decay`.
        lr (`float` or `Tensor` of one element): learning rate.
        beta1, beta2 (`float`): decay rates of the moments, in [0, 1).
        eps (`float`): term added to the denominator, at least 0.
        amsgrad (`bool`): use the maximum of the second moments.
        maximize (`bool`): go along the gradient instead of against it.
        grad_scale (`Tensor` of one element, *optional*): the gradients are divided by it, also in memory.
        found_inf (`Tensor` of one element, *optional*): where it is not 0, nothing changes.

    Raises:
        TypeError: a tensor has another dtype.
    """
    lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else exp_avg_sqs, state_steps]
    if unknown := {t.dtype for tensors in lists for t in tensors}.difference(_DTYPES):
        raise TypeError(
            f"params, grads, moments or steps of dtype {unknown.pop()}: the Triton kernel takes float32, bfloat16, float16 and "
            "float64; use fused=False for others"
        )
    kinds: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
    for tensors in zip(*lists, strict=True):
        kinds[(tensors[0].device, *(t.dtype for t in tensors))].append(tensors)
    if isinstance(lr, Tensor) and lr.is_cpu and not all(p.is_cpu for p in params):
        lr = lr.item()
    for (device, *dtypes), rows in kinds.items():
        on_device = [
            t.to(device, non_blocking=True) if isinstance(t, Tensor) else None
            for t in (decay, lr, grad_scale, found_inf)
        ]
        steps = [row[5] for row in rows]
        torch._foreach_add_(steps, 1 if found_inf is None else (on_device[3] == 0).to(dtypes[5]).squeeze())
        numbers = (
            0.0 if isinstance(lr, Tensor) else lr,
            *(1 - beta1, beta1, math.log(beta1) if beta1 else -math.inf),
            *(1 - beta2, beta2, math.log(beta2) if beta2 else -math.inf),
            eps,
        )
        _launch(rows, device, on_device, numbers, dtypes, amsgrad, maximize)
    changed = [*params, *exp_avgs, *exp_avg_sqs, *(max_exp_avg_sqs if amsgrad else ())]
    for tensor in changed if grad_scale is None else [*changed, *grads]:
        torch.autograd.graph.increment_version(tensor)


def _launch(
    rows: list[tuple[Tensor, ...]],
    device: torch.device,
    on_device: list[Tensor | None],
    numbers: tuple[float, ...],
    dtypes: list[torch.dtype],
    amsgrad: bool,
    maximize: bool,
) -> None:
    # Eight words per tensor: p, g, m, v, max v, step, number of its first program, number of elements. Tensors of which not all are
    # aligned to 16 bytes have a launch of their own, so that they do not slow the others down.
    words: dict[bool, array[int]] = {True: array("q"), False: array("q")}
    programs = {True: 0, False: 0}
    for *tensors, step in rows:
        numel = tensors[0].numel()
        if numel:
            pointers = [t.data_ptr() for t in tensors]
            aligned = not any(pointer % 16 for pointer in pointers)
            words[aligned].extend((*pointers, step.data_ptr(), programs[aligned], numel))
            programs[aligned] += -(-numel // _BLOCK)
    kernel = _compiled()
    for aligned, count in programs.items():
        if count:
            with torch.cuda.device(device if device.type == "cuda" else -1):
                kernel[(count,)](
                    _table(words[aligned].tobytes(), device),
                    len(words[aligned]) // 8,
                    *on_device,
                    # As bits: Triton would round a float argument to float32.
                    *(struct.unpack("q", struct.pack("d", number))[0] for number in numbers),
                    *(getattr(tl, _DTYPES[dtype]) for dtype in dtypes),
                    COMPUTE=tl.float64 if dtypes[0] == torch.float64 else tl.float32,
                    AMSGRAD=amsgrad,
                    MAXIMIZE=maximize,
                    ALIGNED=aligned,
                    BLOCK=_BLOCK,
                    num_warps=8,
                    enable_fp_fusion=True,  # whatever Triton's default
                )


def _table(words: bytes, device: torch.device) -> Tensor:
    """Words on the device, from an earlier call where they are the same."""
    if device.type == "cpu":
        return _host_table(words)
    spares = _spares(len(words))
    if torch.cuda.is_current_stream_capturing():
        # The copy becomes a part of the graph, and its destination a temporary of it.
        if words not in _captured:
            pinned = spares.pop() if spares else _host_table(words, pin=True)
            _captured[words] = pinned.copy_(_host_table(words))
        return _captured[words].to(device, non_blocking=True)
    if not spares:
        spares.append(_host_table(words, pin=True))
    return _device_table(words, device, torch.cuda.current_stream(device).cuda_stream)


def _host_table(words: bytes, pin: bool = False) -> Tensor:
    table = torch.frombuffer(bytearray(words), dtype=torch.int64)
    return table.pin_memory() if pin else table


# On another stream the copy might not have arrived yet, nor the memory be safe to free: hence one table per stream.
@lru_cache(maxsize=64)
def _device_table(words: bytes, device: torch.device, stream: int) -> Tensor:
    return _host_table(words, pin=True).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _spares(length: int) -> list[Tensor]:
    """Pinned memory for the next capture, laid by before it: in a capture not every torch can allocate it."""
    return []


_works: dict[int, bool] = {}


def _imports() -> bool:
    try:
        _compiled()
    except ImportError:
        return False
    return True


def _runs(index: int) -> bool:
    def one() -> list[Tensor]:
        return [torch.zeros((), device=f"cuda:{index}")]

    options = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1.0, "amsgrad": False, "maximize": False}
    try:
        adamw_(one(), one(), one(), one(), [], one(), decay=one()[0], grad_scale=None, found_inf=None, **options)
    except Exception as error:  # whatever Triton's compiler, the C compiler that it calls, or the driver say
        warnings.warn(f"Triton does not run on cuda:{index}, so torch's kernels are used: {error!r}", stacklevel=4)
        return False
    return True


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """The kernel. Nothing is compiled before it is launched."""
    import triton
    import triton.language

    names = globals()
    names["tl"] = triton.language
    for name in ("_number", "_one_minus_exp", "_sqrt"):
        names[name] = triton.jit(names[name])
    # What changes from step to step must not become a part of the program.
    varying = ["tensors", "decay", "lr", "rest1", "beta1", "log_beta1", "rest2", "beta2", "log_beta2", "eps"]
    return triton.jit(_adamw_kernel, do_not_specialize=varying)


def _adamw_kernel(
    table,
    tensors,
    decay,
    lr_tensor,
    grad_scale,
    found_inf,
    lr: tl.int64,
    rest1: tl.int64,
    beta1: tl.int64,
    log_beta1: tl.int64,
    rest2: tl.int64,
    beta2: tl.int64,
    log_beta2: tl.int64,
    eps: tl.int64,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    AVG: tl.constexpr,
    AVG_SQ: tl.constexpr,
    MAX: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    effective_decay = tl.load(decay)  # early, to wait for it together with the rest
    # The last tensor whose first program is not after this one.
    program = tl.program_id(0)
    low = program * 0
    high = low + tensors
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * 8 + 6) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table + low * 8
    p = tl.load(row).to(tl.pointer_type(PARAM))
    g = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m = tl.load(row + 2).to(tl.pointer_type(AVG))
    v = tl.load(row + 3).to(tl.pointer_type(AVG_SQ))
    v_max = tl.load(row + 4).to(tl.pointer_type(MAX))
    step = tl.load(row + 5).to(tl.pointer_type(STEP))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
        g = tl.multiple_of(g, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
        v_max = tl.multiple_of(v_max, 16)
    start = (program - tl.load(row + 6)).to(tl.int64) * BLOCK
    left = tl.load(row + 7) - start
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) != 0, 0, left)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left
    p = p + start + offsets
    g = g + start + offsets
    m = m + start + offsets
    v = v + start + offsets
    v_max = v_max + start + offsets

    # A mask whose length is not known to be a multiple of anything makes every access one of a single element.
    if left >= BLOCK:
        weight, grad, avg, avg_sq = tl.load(p), tl.load(g), tl.load(m), tl.load(v)
        before = tl.load(v_max) if AMSGRAD else avg_sq
    else:
        weight, grad, avg, avg_sq = tl.load(p, mask), tl.load(g, mask), tl.load(m, mask), tl.load(v, mask)
        before = tl.load(v_max, mask) if AMSGRAD else avg_sq
    weight, grad, avg, avg_sq = weight.to(COMPUTE), grad.to(COMPUTE), avg.to(COMPUTE), avg_sq.to(COMPUTE)

    if lr_tensor is not None:
        rate = tl.load(lr_tensor).to(COMPUTE)
    else:
        rate = _number(lr, COMPUTE)
    count = tl.load(step).to(COMPUTE)
    step_size = rate / _one_minus_exp(count * _number(log_beta1, COMPUTE))
    inverse2 = 1 / _sqrt(_one_minus_exp(count * _number(log_beta2, COMPUTE)))

    if grad_scale is not None:
        grad = grad / tl.load(grad_scale).to(COMPUTE)
    grad_to_store = grad
    if MAXIMIZE:
        grad = -grad
    # Not through a factor 1 - lr * decay: its rounding would be a share of the decay.
    weight -= rate * effective_decay.to(COMPUTE) * weight
    avg = _number(beta1, COMPUTE) * avg + _number(rest1, COMPUTE) * grad
    avg_sq = _number(beta2, COMPUTE) * avg_sq + _number(rest2, COMPUTE) * grad * grad
    if AMSGRAD:
        largest = tl.maximum(before.to(COMPUTE), avg_sq, propagate_nan=tl.PropagateNan.ALL)
    else:
        largest = avg_sq
    weight -= step_size * (avg / (_sqrt(largest) * inverse2 + _number(eps, COMPUTE)))

    if left >= BLOCK:
        tl.store(p, weight.to(PARAM))
        tl.store(m, avg.to(AVG))
        tl.store(v, avg_sq.to(AVG_SQ))
        if AMSGRAD:
            tl.store(v_max, largest.to(MAX))
        if grad_scale is not None:
            tl.store(g, grad_to_store.to(GRAD))
    else:
        tl.store(p, weight.to(PARAM), mask)
        tl.store(m, avg.to(AVG), mask)
        tl.store(v, avg_sq.to(AVG_SQ), mask)
        if AMSGRAD:
            tl.store(v_max, largest.to(MAX), mask)
        if grad_scale is not None:
            tl.store(g, grad_to_store.to(GRAD), mask)


def _number(bits, COMPUTE: tl.constexpr):
    """A float64 from its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


def _one_minus_exp(x):
    """1 - exp(x) for x <= 0: in float32 by its series where the difference would cancel, to 5e-7."""
    result = 1 - tl.exp(x)
    if x.dtype == tl.float32:
        y = tl.maximum(x, -0.5)
        series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8))))))
        result = tl.where(x > -0.5, -y * series, result)
    return result


def _sqrt(x):
    """Rounded as IEEE demands: Triton's usual one is approximate in float32, and takes subnormals for 0."""
    if x.dtype == tl.float32:
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)
    return result
