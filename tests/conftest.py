"""Every test starts from the same random state, without the Hub, and with the package that the header names."""

from __future__ import annotations

import importlib
import importlib.metadata
import os

import pytest


# Before anything imports torch or transformers; the processes that tests start inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("HF_SWD_TEST_COMPLETE"):
    # Here all optional packages are installed: a test that cannot import one of them fails.
    pytest.importorskip = lambda name, *args, **kwargs: importlib.import_module(name)


def pytest_report_header() -> str:
    import hf_swd

    versions = []
    for name in ("torch", "transformers", "accelerate", "deepspeed", "trl", "peft"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"hf_swd: {hf_swd.__version__} from {hf_swd.__path__[0]}; {', '.join(versions)}"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)
