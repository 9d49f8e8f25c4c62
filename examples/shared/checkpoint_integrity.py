"""Which of a Trainer's checkpoints can be gone on from: a crash may have cut the newest one off."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader


_STATE = "trainer_state.json"


def last_complete(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The complete checkpoint of the highest step; and of each one of a higher step what is wrong with it."""
    checkpoints = {
        int(match[1]): folder
        for folder in output_dir.iterdir()
        if folder.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    faults = {}
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults[checkpoint] = fault
    return None, faults


def find_fault(checkpoint: Path) -> str | None:
    """
    What says that a checkpoint was not written to its end; `None` if nothing does.

    The Trainer writes its state after everything else. If the machine goes down, files may be cut off or empty
    nevertheless: formats that show it are looked at, without reading the tensors.
    """
    if not (checkpoint / _STATE).is_file():
        return f"it has no {_STATE}, which is written last"
    for file in sorted(checkpoint.rglob("*")):
        check = _CHECKS.get(file.name) or _CHECKS.get(file.suffix)
        if check is not None and file.is_file():
            try:
                check(file)
            except Exception as error:  # every format has its own
                return f"{file.relative_to(checkpoint)} is damaged ({type(error).__name__}: {error})"
    return None


def _check_json(file: Path) -> None:
    content = json.loads(file.read_bytes())
    if file.name.endswith(".index.json"):
        for name in sorted(set(content["weight_map"].values())):
            if not (file.parent / name).is_file():
                raise FileNotFoundError(name)


def _check_safetensors(file: Path) -> None:
    with safe_open(file, "pt"):  # compares the size of the file with that in its header
        pass


def _check_archive(file: Path) -> None:
    with zipfile.ZipFile(file):  # its directory stands at its end
        pass


def _check_shards(metadata: Path) -> None:
    for part in FileSystemReader(metadata.parent).read_metadata().storage_data.values():
        size = (metadata.parent / part.relative_path).stat().st_size
        if size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} has {size} bytes of {part.offset + part.length}")


_CHECKS = {
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    **dict.fromkeys((".bin", ".pt", ".pth"), _check_archive),  # torch.save
    ".metadata": _check_shards,  # torch.distributed.checkpoint
}
