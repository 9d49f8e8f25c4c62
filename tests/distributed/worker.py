"""One rank: runs the given variants one after the other and writes what each returns (or raises) to a folder.

    worker.py RANK WORLD FOLDER SPEC.json

SPEC is a list of {"id", "module", "function", "kwargs"}: see `harness.py`, which starts this.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    specs = json.loads(Path(sys.argv[4]).read_text())
    torch.set_num_threads(1)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    dist.barrier()
    (folder / f"ready.{rank}").touch()
    for spec in specs:
        start = time.monotonic()
        result: dict = {}
        try:
            result["value"] = getattr(importlib.import_module(spec["module"]), spec["function"])(**spec["kwargs"])
        except BaseException as error:
            result["error"] = f"{type(error).__name__}: {error}"
            result["traceback"] = traceback.format_exc()
        print(f"{spec['id']}: {time.monotonic() - start:.1f} s {result.get('error', '')}", flush=True)
        torch.save(result, folder / f"{spec['id']}.{rank}.part")
        (folder / f"{spec['id']}.{rank}.part").rename(folder / f"{spec['id']}.{rank}.pt")
        gc.collect()
        dist.barrier()
    # Destroying gloo groups can abort at exit, after everything has been written.
    sys.stdout.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
