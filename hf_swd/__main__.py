"""`python -m hf_swd` is the console script `hf-swd` for launchers that take a module (`accelerate launch -m`, `torchrun -m`)."""

from __future__ import annotations

import sys

from .launch import main


if __name__ == "__main__":
    sys.exit(main())
