"""`python -m hf_swd` is the console script `hf-swd`, for launchers that take a module (`accelerate launch -m`)."""

from __future__ import annotations

import sys

from .commands.launch import main


if __name__ == "__main__":
    sys.exit(main())
