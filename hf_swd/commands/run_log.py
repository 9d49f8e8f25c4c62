"""What a Trainer leaves of a run in its folder, read without torch or transformers and without running code of it."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


STATE = "trainer_state.json"
_SCHEDULE = ("swd/weight_decay", "swd/grad_rms")
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# Parts of the names of the Trainer's optimizers that shrink the weights by learning rate times weight decay.
_DECOUPLED = ("adamw", "adams", "lion", "ademamix", "adafactor")


@dataclass(frozen=True)
class TrainingLog:
    """
    Logs that have gradient norm and learning rate, and the arguments of the training.

    Args:
        path: folder of the run.
        steps, norms, rates: optimizer step, norm of the gradient before clipping, learning rate of each finite log.
        decays, rms: effective decay and gradient rms of each, of a run with a schedule; else empty.
        last_step: the last step that was logged.
        broken_from: step of the first log that is NaN or infinite.
        optim: name of the optimizer; empty if it is not known.
        optim_args: the parts of `optim_args`.
        weight_decay: `None` if it is not known.
        max_grad_norm: 0 for no clipping; `None` if it is not known.
        beta2: of the schedule, if the run had one of its own; else Adam's.
        warmup_steps: 0 for none.
        num_parameters: scalars in the saved weights (of adapters if there are any); `None` without saved weights.
    """

    path: Path
    steps: list[int]
    norms: list[float]
    rates: list[float]
    decays: list[float]
    rms: list[float]
    last_step: int
    broken_from: int | None
    optim: str
    optim_args: dict[str, str]
    weight_decay: float | None
    max_grad_norm: float | None
    beta2: float
    warmup_steps: int
    num_parameters: int | None

    @property
    def is_decoupled(self) -> bool:
        return has_decoupled_decay(self.optim)


def read_training_log(output_dir: Path) -> TrainingLog:
    """
    Args:
        output_dir: the `output_dir` of a Trainer, a checkpoint, or a `trainer_state.json`.

    Raises:
        FileNotFoundError: no `trainer_state.json`.
        ValueError: it is none, or has fewer than two logs with gradient norm and learning rate.
    """
    state = find_state(output_dir)
    folders = run_folders(state)
    entries = _entries(state)
    finite = [entry for entry in entries if all(map(math.isfinite, _numbers(entry))) and entry["grad_norm"] > 0]
    broken = [entry["step"] for entry in entries if not all(map(math.isfinite, _numbers(entry)))]
    if len(finite) < 2:
        raise ValueError(
            f"{state}: {len(finite)} of its logs have a grad_norm above 0 and a learning_rate, both finite, and 2 are "
            "the least. Train with logging_steps below the number of optimizer steps (the Trainer's default is 500); "
            "transformers before 5.3 logs grad_norm only with max_grad_norm above 0"
        )
    arguments = read_arguments(folders)
    scheduled = all(key in entry for entry in finite for key in _SCHEDULE)
    parts = [part.partition("=") for part in str(arguments.get("optim_args") or "").replace(" ", "").split(",")]
    optim_args = {key: value for key, equals, value in parts if equals}
    warmup = read_number(arguments, "warmup_steps") or read_number(arguments, "warmup_ratio") or 0.0
    last_step = entries[-1]["step"]
    return TrainingLog(
        path=folders[-1],
        steps=[entry["step"] for entry in finite],
        norms=[float(entry["grad_norm"]) for entry in finite],
        rates=[float(entry["learning_rate"]) for entry in finite],
        decays=[float(entry["swd/weight_decay"]) for entry in finite] if scheduled else [],
        rms=[float(entry["swd/grad_rms"]) for entry in finite] if scheduled else [],
        last_step=last_step,
        broken_from=next(iter(broken), None),
        optim="adams" if scheduled and not arguments else str(arguments.get("optim", "")),
        optim_args=optim_args,
        weight_decay=read_number(arguments, "weight_decay"),
        max_grad_norm=read_number(arguments, "max_grad_norm"),
        beta2=_beta2(optim_args) or read_number(arguments, "adam_beta2") or 0.999,
        warmup_steps=math.ceil(warmup * last_step) if warmup < 1 else int(warmup),
        num_parameters=count_saved_parameters(folders),
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


def _beta2(optim_args: dict[str, str]) -> float | None:
    try:
        beta2 = float(optim_args["schedule_beta2"])
    except (KeyError, ValueError):
        return None
    return beta2 if 0 <= beta2 < 1 else None


def count_saved_parameters(folders: Iterable[Path]) -> int | None:
    """Number of floating-point scalars in saved weights, adapters before models, by the headers of their files."""
    for folder in folders:
        for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
            try:
                files = [name]
                if name.endswith(".json"):
                    files = sorted(set(json.loads((folder / name).read_bytes())["weight_map"].values()))
                return sum(_count(folder / file) for file in files)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
                continue
    return None


def _count(file: Path) -> int:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _LARGEST_HEADER:
            raise ValueError(f"{file}: not a safetensors file")
        header = json.loads(opened.read(length))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return sum(math.prod(tensor["shape"]) for tensor in tensors if "F" in tensor["dtype"])


def _entries(state: Path) -> list[dict[str, Any]]:
    """Logs of training steps, with `step` a whole number that grows."""
    result: list[dict[str, Any]] = []
    for entry in read_history(state):
        step = int(entry["step"]) if math.isfinite(entry["step"]) else 0
        if all(map(_is_number, _numbers(entry))) and step > (result[-1]["step"] if result else 0):
            result.append({**entry, "step": step})
    return result


def _numbers(entry: dict[str, Any]) -> list[Any]:
    needed = [entry.get("grad_norm"), entry.get("learning_rate")]
    return [*needed, *(entry[key] for key in _SCHEDULE if key in entry)]


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
