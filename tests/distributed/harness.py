"""Runs variants (functions of a module beside this one) in real processes joined by gloo, many per set of processes.

The processes meet through a file, results come back through files, and whoever hangs or dies is killed and shown with
its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_swd


HERE = Path(__file__).resolve().parent
SECONDS_TO_START = (
    240  # importing torch, transformers and DeepSpeed on a busy machine, and once building DeepSpeed's CPU ops
)
SECONDS_PER_VARIANT = 30


@dataclass(frozen=True)
class Variant:
    """One run: `module.function(**kwargs)` on each of `world` processes."""

    id: str
    module: str
    function: str
    world: int
    kwargs: dict[str, Any]

    def spec(self) -> dict[str, Any]:
        return {"id": self.id, "module": self.module, "function": self.function, "kwargs": self.kwargs}


def variant(
    id: str,
    function: str,
    *,
    world: int = 2,
    module: str = "engines",
    slow: bool = False,
    marks: Sequence[Any] = (),
    **kwargs: Any,
) -> Any:
    """A parameter for `@pytest.mark.parametrize("variant", [...])`; the fixture `results` of `conftest.py` runs it."""
    marks = [*marks, pytest.mark.slow] if slow else marks
    return pytest.param(Variant(id, module, function, world, kwargs), id=id, marks=marks)


def run_variants(
    specs: Sequence[dict[str, Any]], world: int, tmp_path: Path, *, env: dict[str, str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """
    Run variants one after the other in `world` processes.

    Args:
        specs (`Sequence[dict]`): {"id", "module", "function", "kwargs"} each; the ids are different.
        world (`int`): number of processes.
        tmp_path (`Path`): an empty folder.
        env (`dict[str, str]`, *optional*): further environment variables of the processes.

    Returns:
        `dict[str, list[dict]]`: for each id what each rank answered: `{"value": ...}`, or `{"error": "Class: text",
        "traceback": ...}`. A variant that killed its processes, or took too long, has the error "no result" with their
        output; those after it run in new ones.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    remaining, retried, spawns = list(specs), False, 0
    while remaining:
        folder = tmp_path / f"processes{spawns}"
        folder.mkdir(parents=True)
        spawns += 1
        output = _spawn(remaining, world, folder, env or {})
        started = all((folder / f"ready.{rank}").exists() for rank in range(world))
        if not started and not retried:
            retried = True  # gloo's rendezvous fails now and then; nothing else is tried twice
            continue
        missing = []
        for spec in remaining:
            files = [folder / f"{spec['id']}.{rank}.pt" for rank in range(world)]
            if all(file.exists() for file in files):
                results[spec["id"]] = [torch.load(file, weights_only=False) for file in files]
            else:
                missing.append(spec)
        if missing:
            error = f"no result of {missing[0]['id']!r}: the processes died or hung\n{output}"
            results[missing.pop(0)["id"]] = [{"error": error, "traceback": output}] * world
        remaining = missing
    return results


def value_of(results: list[dict[str, Any]]) -> list[Any]:
    """The values of all ranks; fails with the traceback of the first rank that raised."""
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}: {result['error']}\n{result.get('traceback', '')}"
    return [result["value"] for result in results]


def _spawn(specs: list[dict[str, Any]], world: int, folder: Path, env: dict[str, str]) -> str:
    """Start the processes, wait for all of them, kill what is left, and return the end of their output."""
    spec_file = folder / "spec.json"
    spec_file.write_text(json.dumps(specs))
    package, support = Path(hf_swd.__file__).resolve().parents[1], HERE.parent / "support"
    paths = [str(package), str(support), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **env,
    }
    processes, logs = [], []
    for rank in range(world):
        logs.append(folder / f"output.{rank}.txt")
        with logs[-1].open("w") as log:
            command = [sys.executable, str(HERE / "worker.py"), str(rank), str(world), str(folder), str(spec_file)]
            # A session of its own: what it starts (compilers) dies with it.
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            processes.append(process)
    deadline = time.monotonic() + SECONDS_TO_START + SECONDS_PER_VARIANT * len(specs)
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + 15)  # the others cannot go on without it
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tails = (
        f"--- rank {rank}: exit {p.returncode}\n{logs[rank].read_text(errors='replace')[-4000:]}"
        for rank, p in enumerate(processes)
    )
    return "\n".join(tails)
