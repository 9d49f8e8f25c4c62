"""Gradient clipping whose norm serves the schedule as well, so that the gradients are read once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .grad_norm import by_kind, local_part, local_parts, squared_norms
from .recurrence import Measured


# So many elements of a large gradient tell whether it has been divided by a loss scale since it was clipped.
_SAMPLE = 1 << 11


class Clipping:
    """Clips the gradients of one optimizer, and keeps their squared norms for its next step."""

    def __init__(self) -> None:
        self.deferred: Tensor | None = None
        """0-d: what the step under way must multiply the gradients by, after a deferred clipping."""
        self._last: _Clipped | None = None
        self._counts: tuple[Tensor | int, int] = (0, 0)

    def statistics(self) -> tuple[int, int]:
        """How many calls of [`clip`] have clipped, and how many there were. Makes the host wait."""
        clipped, calls = self._counts
        return int(clipped), calls

    def clip(
        self,
        grads: list[Tensor],
        measured: Measured,
        norm: Tensor,
        max_norm: float,
        *,
        defer: bool,
        unclipped: bool,
    ) -> None:
        """
        Scale the gradients in place to a total norm, or note by what they are to be scaled.

        Args:
            grads (`list[Tensor]`): the gradients.
            measured (`Measured`): what a step with them brings as they are.
            norm (0-d `Tensor`): norm of all gradients of the model, of all ranks.
            max_norm (`float`): what it may be at most.
            defer (`bool`): leave the scaling to the step.
            unclipped (`bool`): keep the squared norms as they are before the scaling.
        """
        clipped, calls = self._counts
        self._counts = clipped + (norm + 1e-6 > max_norm), calls + 1
        factor = None
        # Asking whether there is something to clip would make the host wait for an accelerator.
        if max_norm < math.inf and not (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            if not unclipped:
                squares = measured.squares * factor.to(measured.squares) ** 2
                # A square that overflowed: what clipping leaves of such gradients is 0.
                measured = replace(measured, squares=torch.where(norm == math.inf, 0.0, squares))
            if not defer:
                scale_(grads, factor)
        self._last = _Clipped(grads, measured, factor if defer else None) if grads else None

    def settle(self, present: Sequence[Tensor] = ()) -> None:
        """Do what a deferred clipping has left to do, before something else becomes of its gradients. `present`:
        gradients that the coming step will see."""
        if self._last is not None and self._last.settle(present):
            self._last = None

    def take(self, grads: list[Tensor]) -> Measured | None:
        """
        What is known of the gradients of a step, which the step uses up; sets `deferred`.

        Returns:
            `Measured`, or `None` if they are not those that were clipped last.

        Raises:
            RuntimeError: the clipping was deferred, and the gradients are not those.
        """
        last, self._last, self.deferred = self._last, None, None
        if last is None:
            return None
        if torch.is_grad_enabled() or not last.is_of(grads):
            if last.due is None:
                return None
            raise RuntimeError(
                "gradients were changed or replaced between clip_grad_norm_(..., defer=True) and step(): call it "
                "after the last change, or without defer"
            )
        self.deferred = last.due
        return last.measured_now(grads)


class _Clipped:
    """
    What a clipping leaves behind for the step. Holds the gradients weakly.

    Args:
        grads (`list[Tensor]`): the gradients.
        measured (`Measured`): what a step with them brings, once they are scaled.
        due (0-d `Tensor`, *optional*): the factor that they are still to be multiplied by.
    """

    def __init__(self, grads: list[Tensor], measured: Measured, due: Tensor | None = None) -> None:
        self.due = due
        self._seen = list(zip(map(weakref.ref, grads), _versions(grads), strict=True))
        self._measured = measured
        smallest = min(range(len(grads)), key=lambda i: grads[i].numel() or math.inf)
        self._probe = smallest, _square_of_sample(grads[smallest])

    def is_of(self, grads: list[Tensor]) -> bool:
        """Whether `grads` are the tensors that were clipped, and none was written to since. (A GradScaler that
        unscales them is not noticed here; see [`measured_now`].)"""
        return len(grads) == len(self._seen) and all(
            reference() is grad is not None and known == version
            for (reference, known), grad, version in zip(self._seen, grads, _versions(grads), strict=True)
        )

    def measured_now(self, grads: list[Tensor]) -> Measured:
        """What a step with them brings. A GradScaler may have divided all of them by its scale, which their version
        counters do not show: the ratio of one gradient's squared norms, now and when it was clipped, does."""
        smallest, before = self._probe
        ratio = torch.where(before > 0, _square_of_sample(grads[smallest]) / before, 1.0)
        return replace(self._measured, squares=self._measured.squares * ratio)

    def settle(self, present: Sequence[Tensor]) -> bool:
        """Scale those gradients that are still there, if that is due; `False` if one was written to, or one of the
        present was not clipped, which a step will complain of."""
        left = [(grad, version) for reference, version in self._seen if (grad := reference()) is not None]
        grads = [grad for grad, _ in left]
        if self.due is not None:
            are_new = not set(map(id, present)) <= set(map(id, grads))
            if are_new or _versions(grads) != [version for _, version in left]:
                return False
            scale_(grads, self.due)
        return True


def _square_of_sample(grad: Tensor) -> Tensor:
    """Squared norm of a gradient, or of a sample of it."""
    grad = local_part(grad)
    if grad.numel() > 2 * _SAMPLE:
        grad = grad.reshape(-1)[:: grad.numel() // _SAMPLE]
    return squared_norms([grad])


def _versions(tensors: list[Tensor]) -> list[int]:
    return [tensor._version for tensor in local_parts(tensors)]


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors (of a DTensor the part that this rank holds) in place by a number (0-d)."""
    parts = local_parts(tensors)
    for (device, dtype), indices in by_kind(parts).items():
        torch._foreach_mul_([parts[i] for i in indices], factor.to(device, dtype, non_blocking=True))  # pyright: ignore[reportPrivateImportUsage]
