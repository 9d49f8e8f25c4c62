"""Gradient clipping whose norm serves the schedule as well, so that the gradients are read once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .grad_norm import by_kind, local_part, local_parts, squared_norms


__all__ = ["Clipping", "scale_"]

# Of a large gradient so many elements are looked at again, to notice that it has been divided by a loss scale.
_SAMPLE = 1 << 11


class Clipping:
    """Clips the gradients of one optimizer, and keeps their squared norms for its next step."""

    def __init__(self) -> None:
        self._last: _Clipped | None = None
        self._counts: tuple[Tensor | int, int] = (0, 0)

    def statistics(self) -> tuple[int, int]:
        """How many calls of [`clip`] have clipped, and how many there were. Makes the host wait."""
        clipped, calls = self._counts
        return int(clipped), calls

    def clip(
        self, grads: Sequence[Tensor], squares: Tensor, norm: Tensor, max_norm: float, *, defer: bool, unclipped: bool
    ) -> None:
        """
        Scale the gradients in place to a total norm, or note by what they are to be scaled.

        Args:
            grads (`Sequence[Tensor]`): the gradients.
            squares (`Tensor`, shape `(len(grads),)`): their squared norms.
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
                squares = squares * factor.to(squares) ** 2
            if not defer:
                scale_(grads, factor)
        self._last = _Clipped(grads, squares, factor if defer else None) if grads else None

    def settle(self) -> None:
        """Do what a deferred clipping has left to do, while its gradients are still known."""
        last, self._last = self._last, None
        if last is not None:
            last.settle()

    def take(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """
        What is known of the gradients of a step, which the step uses up.

        Returns:
            `tuple[Tensor | None, Tensor | None]`: their squared norms, of shape `(len(grads),)`, or `None` if they are not those that were
            clipped last; and by what the step must still multiply them, 0-d, or `None`.

        Raises:
            RuntimeError: the clipping was deferred, and the gradients are not those.
        """
        last, self._last = self._last, None
        if last is None:
            return None, None
        if torch.is_grad_enabled() or not last.are(grads):
            if last.due is None:
                return None, None
            raise RuntimeError(
                "gradients were changed or replaced between clip_grad_norm_(..., defer=True) and step(): call it after the last change, "
                "or without defer"
            )
        return last.squares_of(grads), last.due


class _Clipped:
    """
    What clipping leaves behind for the step: the squared norms, whether given gradients are still the clipped ones, and by what they are
    yet to be scaled. Holds the gradients weakly.

    Args:
        grads (`Sequence[Tensor]`): the gradients.
        squares (`Tensor`, shape `(len(grads),)`): their squared norms, once they are scaled.
        due (0-d `Tensor`, *optional*): the factor that they are still to be multiplied by.
    """

    def __init__(self, grads: Sequence[Tensor], squares: Tensor, due: Tensor | None = None) -> None:
        self.due = due
        self._references = [weakref.ref(grad) for grad in grads]
        self._versions = _versions(grads)
        self._squares = squares
        self._probe = min(range(len(grads)), key=lambda i: grads[i].numel() or math.inf)
        self._probed = self._sample(grads)

    def are(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are the clipped gradients, unchanged since, but perhaps for a common factor."""
        return (
            len(grads) == len(self._references)
            and all(reference() is grad is not None for reference, grad in zip(self._references, grads, strict=True))
            and self._versions == _versions(grads)
        )

    def squares_of(self, grads: Sequence[Tensor]) -> Tensor:
        """Their squared norms, of shape `(len(grads),)`."""
        # A GradScaler that unscales after clipping leaves no trace in the versions; a small gradient, or a part, tells by what it divided.
        ratio = self._sample(grads) / self._probed
        return self._squares * torch.where(self._probed > 0, ratio, 1.0)

    def _sample(self, grads: Sequence[Tensor]) -> Tensor:
        grad = local_part(grads[self._probe])
        if grad.numel() > 2 * _SAMPLE:
            grad = grad.reshape(-1)[:: grad.numel() // _SAMPLE]
        return squared_norms([grad])

    def settle(self) -> None:
        """Scale the gradients now, if that is due and they are still there, unchanged."""
        grads = [reference() for reference in self._references]
        if self.due is not None and self.are(grads):
            scale_(grads, self.due)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in local_parts(tensors)]


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors (of a DTensor the part that this rank holds) in place by a number (0-d)."""
    parts = local_parts(tensors)
    for (device, dtype), indices in by_kind(parts).items():
        torch._foreach_mul_([parts[i] for i in indices], factor.to(device, dtype, non_blocking=True))
