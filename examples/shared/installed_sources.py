"""Source files of the installed packages, in an order that no file system changes: texts without a download."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from pathlib import Path


SKIPPED_FOLDERS = {
    "_vendor",
    "dist-packages",
    "externals",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "testing",
    "tests",
}


def stable_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def source_folder(library: str) -> Path | None:
    """Folder of a library's source files, found without importing it; None if it is not installed.

    Args:
        library (`str`): an import name; "python" is the standard library.
    """
    if library == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def source_files(folder: Path) -> list[tuple[str, Path]]:
    """(relative name, path) by a hash of the name: any prefix is a fair sample, the same on every file system."""
    files: dict[str, Path] = {}
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        paths = [Path(parent, name) for name in names if name.endswith(".py")]
        files.update((path.relative_to(folder).as_posix(), path) for path in paths)
    return [(name, files[name]) for name in sorted(files, key=stable_hash)]
