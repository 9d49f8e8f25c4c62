"""Two machines: a launcher on each (`accelerate launch --num_machines 2 ...`), joined by address and port.

The machines are two network namespaces of this one, joined by a veth pair: each sees its own loopback and one end of
the pair, and reaches the other through the pair only. Where namespaces are not permitted, they are two launchers on
the loopback interface.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import clm_task
import pytest
import task
import torch
from safetensors.torch import load_file
from test_accelerate import same_on_all_ranks


pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
tiny_llama, text_file = clm_task.tiny_llama, clm_task.text_file


@dataclass
class Machines:
    prefixes: tuple[list[str], list[str]]
    address: str
    interfaces: tuple[str, str]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    name = f"swd{uuid.uuid4().hex[:6]}"
    spaces, ends = (f"{name}-0", f"{name}-1"), (f"{name}a", f"{name}b")
    try:
        if shutil.which("ip") is None:
            raise FileNotFoundError("no command ip (package iproute2)")
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", ends[0], "netns", spaces[0], "type", "veth", "peer", "name", ends[1], "netns", spaces[1])
        for number, (space, end) in enumerate(zip(spaces, ends, strict=True), start=1):
            _ip("-n", space, "address", "add", f"10.83.0.{number}/24", "dev", end)
            _ip("-n", space, "link", "set", end, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        prefixes = tuple(["ip", "netns", "exec", space] for space in spaces)
        print("two network namespaces joined by a veth pair")
        yield Machines(prefixes, "10.83.0.1", ends)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"two launchers on loopback, since network namespaces cannot be made: {getattr(error, 'stderr', error)}")
        yield Machines(([], []), "127.0.0.1", ("lo", "lo"))
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True) if shutil.which("ip") else None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _launch(machines: Machines, processes: int, script: list[str], folder: Path) -> list[str]:
    """Start the launcher of each machine, wait for both; what they wrote."""
    paths = [str(HERE / "cpu_shim"), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    port = _free_port()
    launchers, logs = [], []
    for rank, (prefix, interface) in enumerate(zip(machines.prefixes, machines.interfaces, strict=True)):
        command = [*prefix, sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "examples" / "configs" / "multi_node.yaml"), "--mixed_precision", "no"]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", str(processes)]
        command += ["--main_process_ip", machines.address, "--main_process_port", str(port)]
        command += script
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        logs.append(folder / f"launcher.{rank}.txt")
        with logs[-1].open("w") as log:
            launchers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
    try:
        codes = [launcher.wait(timeout=500) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait(timeout=60)
    outputs = [log.read_text(errors="replace") for log in logs]
    assert codes == [0, 0], "\n".join(output[-4000:] for output in outputs)
    return outputs


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_machines_repeat_the_reference(machines, processes, tmp_path):
    engines = ["ddp", "fsdp2", "zero2", "zero3"]
    _launch(machines, processes, [str(HERE / "multi_node_main.py"), str(tmp_path), *engines], tmp_path)
    for engine in engines:
        answers = [torch.load(tmp_path / f"{engine}.{rank}.pt") for rank in range(processes)]
        nodes = [answer["node"] for answer in answers]
        assert nodes == sorted("01" * (processes // 2))
        if machines.prefixes[0]:
            # Each machine sees its own end of the pair, not the other's and not this machine's interfaces.
            for answer in answers:
                assert answer["addresses"] == sorted(["lo", machines.interfaces[int(answer["node"])]])
        weights = same_on_all_ranks([answer["weights"] for answer in answers])
        distance = task.distance(weights, task.reference().weights)
        print(f"{engine}: distance {distance:.2g}")
        assert distance < 1e-4


@pytest.mark.slow
def test_language_model_on_two_machines_is_that_of_one_process(machines, tiny_llama, text_file, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra: examples")
    settings = clm_task.settings(tiny_llama, text_file, tmp_path / "out", per_device_train_batch_size=8)
    arguments = [str(part) for item in settings.items() for part in (f"--{item[0]}", item[1])]
    outputs = _launch(machines, 2, [str(ROOT / "examples" / "language_modeling" / "run_clm.py"), *arguments], tmp_path)
    assert any("Engine = MULTI_GPU, 2 processes, DistributedDataParallel, AdamS" in output for output in outputs)
    reference = clm_task.run_here(clm_task.settings(tiny_llama, text_file, tmp_path / "one"), monkeypatch)
    for entry, expected in zip(clm_task.history(tmp_path / "out"), reference, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert entry["swd/weight_decay"] == pytest.approx(expected["swd/weight_decay"], rel=1e-4)
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4, msg=key)
