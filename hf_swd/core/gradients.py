"""What a step brings: the gradients of all parameters together, summed over everything that holds a part of the model.

[`GradientSource`] is the seam: the parameters themselves (`parameter_gradients.py`), or an engine that knows the norm
of the whole gradient (`engines/zero.py`). The schedule knows nothing else of parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .grad_norm import placed_as
from .recurrence import Numbers, StepTotals


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


class GroupGradients(NamedTuple):
    """The parameters of one group that have a gradient, and what the optimizer keeps of each (empty before its first
    step)."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]

    @property
    def beta2(self) -> float | Tensor:
        """Decay rate of the optimizer's second moment."""
        beta2: float | Tensor = self.group["betas"][1]
        return beta2

    @property
    def amsgrad(self) -> bool:
        """Whether the optimizer takes the maximum of the second moment."""
        return bool(self.group.get("amsgrad"))


def with_gradients(optimizer: Optimizer) -> list[GroupGradients]:
    """
    What the coming step is made of, group by group. Gradients that are DTensors are first placed as their parameters.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    groups = []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        grads: list[Tensor] = [p.grad for p in params]
        if set(map(type, grads)) - {Tensor}:
            for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                grads[i] = p.grad = placed_as(grad, p)
        sparse = next((grad for grad in grads if grad.is_sparse), None)
        if sparse is not None:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(sparse.shape)} is sparse, and scheduled weight decay "
                "needs dense gradients: use sparse=False in its nn.Embedding, or give it to torch.optim.SparseAdam"
            )
        groups.append(GroupGradients(group, params, grads, [optimizer.state.get(p, {}) for p in params]))
    return groups


class GradientSource(ABC):
    """What the schedule asks of whoever knows the gradient of the whole model."""

    process_group: ProcessGroup | None = None
    """Ranks whose optimizers hold disjoint parts of the model."""

    clips_itself = False
    """Whether the gradient is clipped after it was measured and before the optimizer sees it."""

    def begins_step(self) -> bool:
        """Whether this `step()` of the optimizer is the first one of a new step of whoever calls it."""
        return True

    @abstractmethod
    def measure(self, groups: list[GroupGradients], before: Numbers, *, unclipped: bool) -> StepTotals | None:
        """
        What the coming step brings; `None` if there is no gradient anywhere.

        Args:
            groups: what this rank's optimizer will step.
            before: the schedule's numbers.
            unclipped: whether the mean is one of gradients before clipping, which Adam's moments do not tell.
        """

    @abstractmethod
    def norm(self, groups: list[GroupGradients]) -> Tensor:
        """2-norm of the whole gradient, 0-d."""

    @abstractmethod
    def end_step(self, clip: Tensor | None) -> None:
        """The step that was measured last was made, with gradients multiplied by `clip`."""

    @abstractmethod
    def refresh(self) -> None:
        """Let the next step begin with what the optimizer's state says."""
