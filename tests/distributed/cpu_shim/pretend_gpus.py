"""Test-only: has accelerate take gloo processes on the CPU for processes with a GPU each.

accelerate drops FSDP and DeepSpeed without a word when it is told to use the CPU, and trains under DDP. With this, it
builds the engine that was asked for, on the CPU and over gloo. Nothing here is needed, or should be used, outside of
tests.
"""

from __future__ import annotations

import os


def install() -> None:
    # The device is the CPU although nobody said `use_cpu`; DDP then wants no device numbers.
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu", ACCELERATE_BYPASS_DEVICE_MAP="true")
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    try:
        import transformers.utils
    except ImportError:
        return
    # TrainingArguments(bf16=True) asks, unless it was imported before.
    transformers.utils.is_torch_bf16_gpu_available = lambda: True
