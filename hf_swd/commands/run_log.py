"""What a Trainer leaves of a run in its folder, read without torch or transformers and without running code of it."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


STATE = "trainer_state.json"
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# Parts of the names of the Trainer's optimizers that shrink the weights by learning rate times weight decay.
_DECOUPLED = ("adamw", "adams", "lion", "ademamix", "adafactor")


@dataclass(frozen=True)
class TrainingLog:
    """
    What a run logged, and the arguments of the training.

    Args:
        path: as it was named.
        entries: finite logs of training steps with a learning rate, their steps growing.
        evaluations: the first log of each step with a number of the evaluation.
        last_step: the last step that was logged.
        broken_from: step of the first log of training that is NaN or infinite.
        arguments: of the Trainer; empty if they are not known.
        optim: name of the optimizer; empty if it is not known.
        optim_args: the parts of `optim_args`.
        weight_decay, max_grad_norm: `None` if they are not known.
        dtypes: number of floating-point scalars of each dtype in the saved weights (of adapters if there are any).
    """

    path: Path
    entries: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    last_step: int
    broken_from: int | None
    arguments: dict[str, Any]
    optim: str
    optim_args: dict[str, str]
    weight_decay: float | None
    max_grad_norm: float | None
    dtypes: dict[str, int]

    @property
    def steps(self) -> list[int]:
        return self.column("step")

    @property
    def epochs(self) -> float | None:
        """Passes over the training data."""
        epochs: list[float] = self.column("epoch")
        return epochs[-1] if epochs else None

    @property
    def num_parameters(self) -> int:
        """0 without saved weights."""
        return sum(self.dtypes.values())

    def column(self, key: str) -> list[Any]:
        return [entry[key] for entry in self.entries if key in entry]


def read_training_log(output_dir: Path) -> TrainingLog:
    """
    Args:
        output_dir: the `output_dir` of a Trainer, a checkpoint, or a `trainer_state.json`.

    Raises:
        FileNotFoundError: no `trainer_state.json`.
        ValueError: it is none, or has fewer than two logs with a learning rate.
    """
    state = find_state(output_dir)
    folders = run_folders(state)
    history = read_history(state)
    logs = _growing(entry for entry in history if _is_number(entry.get("learning_rate")))
    entries = [entry for entry in logs if all(math.isfinite(v) for v in entry.values() if _is_number(v))]
    if len(entries) < 2:
        raise ValueError(
            f"{state}: {len(entries)} of its logs are finite and have a learning_rate, and 2 are the least. Train "
            "with logging_steps below the number of optimizer steps (the Trainer's default is 500)"
        )
    broken = [entry["step"] for entry in logs if entry not in entries]
    arguments = read_arguments(folders)
    parts = [part.partition("=") for part in str(arguments.get("optim_args") or "").replace(" ", "").split(",")]
    scheduled = "swd/weight_decay" in entries[-1]
    return TrainingLog(
        path=output_dir,
        entries=entries,
        evaluations=_growing(entry for entry in history if any(key.startswith("eval_") for key in entry)),
        last_step=logs[-1]["step"],
        broken_from=next(iter(broken), None),
        arguments=arguments,
        optim="adams" if scheduled and not arguments else str(arguments.get("optim", "")),
        optim_args={key: value for key, equals, value in parts if equals},
        weight_decay=read_number(arguments, "weight_decay"),
        max_grad_norm=read_number(arguments, "max_grad_norm"),
        dtypes=read_dtypes(folders),
    )


def find_state(path: Path) -> Path:
    """The `trainer_state.json` of an output folder (or else of its last checkpoint), of a checkpoint, or itself.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path.resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder or file; expected the output_dir of a Trainer, or its {STATE}"
        )
    checkpoints = [
        (int(match[1]), folder)
        for folder in path.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    for folder in (path, *(folder for _, folder in sorted(checkpoints, reverse=True))):
        if (folder / STATE).is_file():
            return (folder / STATE).resolve()
    raise FileNotFoundError(
        f"{path}: found neither {STATE} nor checkpoint-N/{STATE}. A Trainer writes it with each checkpoint "
        "(save_strategy) and in trainer.save_state()."
    )


def run_folders(state: Path) -> list[Path]:
    """The folder of a `trainer_state.json`, and if that is a checkpoint, then the one that it is in."""
    folder = state.parent
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def read_history(state: Path) -> list[dict[str, Any]]:
    """The entries of a `trainer_state.json` that have a step.

    Raises:
        ValueError: it is no trainer state.
    """
    try:
        history = json.loads(state.read_bytes())["log_history"]
        return [entry for entry in history if isinstance(entry["step"], (int, float))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last: nested too deeply
        raise ValueError(
            f"{state}: not a trainer state in JSON with log_history and steps in it ({error!r})"
        ) from None


def read_arguments(folders: Iterable[Path]) -> dict[str, Any]:
    """
    The arguments of a training, from the `training_args.bin` (or `training_args.json`) of the first folder that has
    one; empty if there is none that can be read. Objects in it have stand-ins, so that none of their code runs.
    """
    for folder in folders:
        for read in (_read_pickled, _read_json):
            try:
                arguments = read(folder)
            except Exception:  # absent, damaged, or of another format: then they are not known
                continue
            optim = arguments.get("optim", "")
            # A member of an Enum is pickled by value or by name, and adams by a function without arguments.
            parts = getattr(optim, "args", (optim,))
            return {**arguments, "optim": str(parts[-1] if parts else "adams").lower().rpartition(".")[2]}
    return {}


def has_decoupled_decay(optim: str) -> bool:
    """Whether the weight decay of the Trainer's optimizer of this name is not a term of the gradient."""
    return any(part in optim for part in _DECOUPLED)


def read_dtypes(folders: Iterable[Path]) -> dict[str, int]:
    """Number of scalars of each floating-point dtype ("F32", "BF16") in saved weights, adapters before models, by the
    headers of their files; empty without saved weights."""
    for folder in folders:
        for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
            try:
                files = [name]
                if name.endswith(".json"):
                    files = sorted(set(json.loads((folder / name).read_bytes())["weight_map"].values()))
                counts: Counter[str] = Counter()
                for file in files:
                    for tensor in _read_header(folder / file):
                        counts[tensor["dtype"]] += math.prod(tensor["shape"])
                return {dtype: count for dtype, count in counts.items() if "F" in dtype}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
                continue
    return {}


def _read_header(file: Path) -> list[dict[str, Any]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _LARGEST_HEADER:
            raise ValueError(f"{file}: not a safetensors file")
        header = json.loads(opened.read(length))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]


def _growing(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose `step`, a whole number, is above that of all before: a model that is evaluated again at the end has
    two entries there."""
    result: list[dict[str, Any]] = []
    for entry in entries:
        step = int(entry["step"]) if math.isfinite(entry["step"]) else 0
        if step > (result[-1]["step"] if result else 0):
            result.append({**entry, "step": step})
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_number(arguments: dict[str, Any], key: str) -> float | None:
    """A finite number among arguments; `None` for anything else."""
    value = arguments.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


class _Unknown(dict[Any, Any]):
    """Stands for every object in a pickle: its contents are kept, and nothing is imported or called."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Unknown,), {})

    def persistent_load(self, pid: Any) -> None:
        return None


def _read_pickled(folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(folder / "training_args.bin") as archive:
        member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(member) as file:
            return dict(_Unpickler(file).load())


def _read_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training_args.json").read_bytes()))
