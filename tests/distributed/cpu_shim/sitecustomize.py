"""Test-only: with this folder on PYTHONPATH, every process of `accelerate launch` runs its engine on the CPU."""

import os


if "LOCAL_RANK" in os.environ:
    import pretend_gpus

    pretend_gpus.install()
