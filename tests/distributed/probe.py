"""What a test wants to know of a run besides its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_swd.core.wrappers import schedule_of


class Probe:
    """
    Watches every `step()` that an engine makes on a torch optimizer: several inner ones per optimizer step under ZeRO.

    Attributes:
        decays (`list[list[float]]`): for each optimizer step the different effective decays that its inner steps used.
        collectives (`list[list[int]]`): for each optimizer step the bytes of every collective inside the inner steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.decays: list[list[float]] = []
        self.collectives: list[list[int]] = []
        self._seen_decays: set[float] = set()
        self._seen_bytes: list[int] = []
        inner_step = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            with _Collectives(self._seen_bytes):
                result = inner_step(*args, **kwargs)
            decays = (float(g["weight_decay"]) for g in optimizer.param_groups if g.get("initial_weight_decay"))
            self._seen_decays.update(decays)
            return result

        optimizer.step = step

    def end_of_step(self) -> None:
        """Call it after each optimizer step of the engine."""
        self.decays.append(sorted(self._seen_decays))
        self.collectives.append(list(self._seen_bytes))
        self._seen_decays.clear()
        self._seen_bytes.clear()

    def report(self, weights: dict[str, Tensor], **more: Any) -> dict[str, Any]:
        schedule = schedule_of(self.optimizer)
        step_count = None if schedule is None else schedule.step_count
        found = {"weights": weights, "decays": self.decays, "collectives": self.collectives, "step_count": step_count}
        return {**found, **more}


class _Collectives(TorchDispatchMode):
    """Notes the bytes of each collective, whoever starts it."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
            self.seen.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))
        return func(*args, **(kwargs or {}))
