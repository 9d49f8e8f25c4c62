"""Which operators read a tensor, and how much of it."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchDispatchMode):
    """By name, how often the operators inside the block have read a given tensor: 1 for all of its elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.storage, self.numel = tensor.untyped_storage().data_ptr(), tensor.numel()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs or {}), result)
        )
        read = [t for t in given if t.untyped_storage().data_ptr() == self.storage]
        is_view = func.is_view or (made and all(t.untyped_storage().data_ptr() == self.storage for t in made))
        if read and not is_view:
            self.times[func.overloadpacket.__name__] += sum(t.numel() for t in read) / self.numel
        return result
