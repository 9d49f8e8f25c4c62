"""What each process of test_multi_node.py runs: the run of `task.py` under each engine that is named.

    multi_node_main.py FOLDER ENGINE...

Each process writes its weights and its host name to FOLDER.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    import engines_accelerate

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for engine in sys.argv[2:]:
        result = {
            "weights": engines_accelerate.run(engine),
            "addresses": addresses(),
            "node": os.environ["GROUP_RANK"],
        }
        torch.save(result, folder / f"{engine}.{dist.get_rank()}.pt")
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # destroying gloo groups can abort at exit


def addresses() -> list[str]:
    """Names of the network interfaces that this process sees."""
    return sorted(name for _, name in socket.if_nameindex())


if __name__ == "__main__":
    main()
