"""What a Trainer leaves of a run in its folder, read without torch or transformers and without running code of it."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import statistics
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any


STATE = "trainer_state.json"
# Parts of the names of the Trainer's optimizers that shrink the weights by learning rate times `weight_decay`.
_CONSTANT_DECAY = ("adamw", "lion", "ademamix", "adafactor")


@dataclass(frozen=True)
class Run:
    """
    What a run logged, and the arguments of the training.

    Args:
        path: as it was named.
        state: its `trainer_state.json`.
        history: the entries of that which have a step.
        end: its own step and epoch, and how many steps were planned, as far as it has them: the last log of training
            is from before.
        arguments: of the Trainer; empty if they are not known.
        dtypes: number of floating-point scalars of each dtype in the saved weights (of adapters if there are any).
    """

    path: Path
    state: Path
    history: list[dict[str, Any]]
    end: dict[str, Any]
    arguments: dict[str, Any]
    dtypes: dict[str, int]

    @property
    def optim(self) -> str:
        """Name of the optimizer; empty if it is not known."""
        is_scheduled = not self.arguments and self.logged("swd/weight_decay")
        return "adams" if is_scheduled else str(self.arguments.get("optim", ""))

    @property
    def weight_decay(self) -> float | None:
        return self.number("weight_decay")

    @property
    def constant_decay(self) -> float | None:
        """`weight_decay` if that is what acts in every step: `None` for a schedule, or a term of the gradient."""
        is_constant = self.weight_decay == 0 or any(part in self.optim for part in _CONSTANT_DECAY)
        return self.weight_decay if is_constant else None

    def number(self, key: str) -> float | None:
        """A finite number among the arguments; `None` for anything else."""
        value = self.arguments.get(key)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def logged(self, key: str) -> list[tuple[float, float]]:
        """Steps and values of a log key, NaN and infinity included."""
        return _series(self.history, key)

    def evaluated(self, key: str) -> list[tuple[float, float]]:
        """The same of the evaluations, without those that were made twice."""
        return _series(self.evaluations, key)

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The logs of training steps with a learning rate, their steps growing."""
        return _growing(entry for entry in self.history if isinstance(entry.get("learning_rate"), (int, float)))

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """Those of `training` without NaN and infinity."""
        return [*filter(_is_finite, self.training)]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The numbers of the evaluations of each step: of all datasets, and the first of what was evaluated twice."""
        return _growing(entry for entry in self.history if any(key.startswith("eval_") for key in entry))

    @property
    def last_step(self) -> int:
        return int(self.end.get("global_step") or self.training[-1]["step"])

    @property
    def planned_steps(self) -> int:
        """More than `last_step` if it was stopped."""
        return max(self.last_step, int(self.end.get("max_steps") or 0))

    @property
    def broken(self) -> list[int]:
        """Steps of the logs of training that are NaN or infinite."""
        return [log["step"] for log in self.training if not _is_finite(log)]

    @property
    def epochs(self) -> float | None:
        """Passes over the training data."""
        return self.end.get("epoch") or next((log["epoch"] for log in reversed(self.training) if "epoch" in log), None)

    def column(self, key: str) -> list[float]:
        return [entry[key] for entry in self.entries if isinstance(entry.get(key), (int, float))]

    @cached_property
    def decays(self) -> list[float] | None:
        """The effective weight decay of each of `entries`; `None` if it is not known."""
        decays = self.column("swd/weight_decay")
        if not decays and self.constant_decay is not None:
            decays = [self.constant_decay] * len(self.entries)
        return decays if len(decays) == len(self.entries) else None

    @property
    def total_decay(self) -> float | None:
        """Learning rate times effective weight decay, summed over the run; `None` if it is not known. The weights
        would shrink by its negative exponential if nothing else moved them."""
        return None if self.decays is None else self._integral(self.decays)

    @property
    def total_of_one(self) -> float:
        """The same with a `weight_decay` of 1, by the gradient rms that a schedule has logged."""
        rms = self.column("swd/grad_rms")
        if len(rms) < len(self.entries):
            return self.sum_of_rates
        option = re.search(r"reference_steps=(\d+)", str(self.arguments.get("optim_args")))
        start = int(option[1]) if option else 0
        logged = [*zip(self.column("step"), rms, strict=True)]
        reference = next((value for step, value in logged if step >= start), 0.0) if start else 1.0
        return self._integral([reference / value if step >= start and value else 1.0 for step, value in logged])

    @property
    def largest_share(self) -> float:
        """The largest part of the weights that decay took in a logged step; 0 if it is not known."""
        return max(map(math.prod, zip(self.column("learning_rate"), self.decays or [], strict=False)), default=0.0)

    @property
    def sum_of_rates(self) -> float:
        return self._integral([1.0] * len(self.entries))

    def _integral(self, decays: Sequence[float]) -> float:
        """Over all steps, by the trapezoidal rule between logs, and before the first as there."""
        products = [rate * decay for rate, decay in zip(self.column("learning_rate"), decays, strict=True)]
        steps, heights = pairwise([0, *self.column("step")]), pairwise([products[0], *products])
        return sum((stop - start) * (a + b) / 2 for (start, stop), (a, b) in zip(steps, heights, strict=True))

    @property
    def mean_decay(self) -> float | None:
        """Weighted by the learning rate: the constant decay that would shrink the weights as much."""
        if self.decays and len(set(self.decays)) == 1:
            return self.decays[0]  # without the rounding of sums
        total, rates = self.total_decay, self.sum_of_rates
        return total / rates if total is not None and rates else None

    def eval_losses(self, key: str) -> list[tuple[float, float]]:
        """Those that are finite, with their steps."""
        return [(step, loss) for step, loss in self.evaluated(key) if math.isfinite(loss)]

    @property
    def last_loss(self) -> float | None:
        """Mean training loss of the last logs, since that of one log is mostly noise."""
        losses = self.column("loss")
        return statistics.fmean(losses[-max(1, min(5, len(losses) // 10)) :]) if losses else None

    @property
    def is_one_pass(self) -> bool:
        """Then no sample was seen twice, and the model cannot have learnt them by heart."""
        return self.epochs is not None and self.epochs <= 1

    def gap(self, key: str) -> float | None:
        """Part of the evaluation loss `key` at the end by which the training loss is below it."""
        losses, loss = self.eval_losses(key), self.last_loss
        if not losses or losses[-1][1] <= 0 or loss is None or self.is_one_pass:
            return None
        return 1 - loss / losses[-1][1]

    def rise(self, key: str) -> float | None:
        """Part of the evaluation loss `key` at the end by which its minimum is below it."""
        losses = [loss for _, loss in self.eval_losses(key)]
        return 1 - min(losses) / losses[-1] if len(losses) > 1 and losses[-1] > 0 else None


def read_runs(output_dirs: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """
    Args:
        output_dirs: each the `output_dir` of a Trainer, a checkpoint, a `trainer_state.json`, or a folder of runs.
            Naming a run twice reads it once.

    Raises:
        FileNotFoundError: no `trainer_state.json`.
        ValueError: it is none, or `output_dirs` is empty.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, output_dirs):
        inside = sorted(path.iterdir()) if path.is_dir() and _find_state(path) is None else []
        for one in [folder for folder in inside if folder.is_dir() and _find_state(folder)] or [path]:
            run = read_run(one)
            runs.setdefault(run.state.resolve(), run)
    if not runs:
        raise ValueError("output_dirs=[]: name at least one output_dir of a Trainer")
    return [*runs.values()]


def read_run(output_dir: Path) -> Run:
    """
    Args:
        output_dir: the `output_dir` of a Trainer, a checkpoint, or a `trainer_state.json`.

    Raises:
        FileNotFoundError: no `trainer_state.json`.
        ValueError: it is none.
    """
    state = _find_state(output_dir)
    if state is None:
        raise FileNotFoundError(
            f"{output_dir}: found neither {STATE} nor checkpoint-N/{STATE}, nor a folder of runs with them. A Trainer "
            "writes it with each checkpoint (save_strategy) and in trainer.save_state()."
        )
    # The other files may lie beside the state; or in the folder of the run, or its last checkpoint.
    folders = [state.parent, *_checkpoints(state.parent)]
    if state.parent.name.startswith("checkpoint-"):
        folders.append(state.parent.parent)
    return Run(output_dir, state, *_read_state(state), _read_arguments(folders), _read_dtypes(folders))


def _find_state(path: Path) -> Path | None:
    """The `trainer_state.json` of an output folder (or else of its last checkpoint), of a checkpoint, or itself."""
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder or file; expected the output_dir of a Trainer, or its {STATE}"
        )
    states = (folder / STATE for folder in (path, *_checkpoints(path)))
    return next((state.absolute() for state in states if state.is_file()), None)


def _checkpoints(folder: Path) -> list[Path]:
    """The last one first."""
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _read_state(state: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`history` and `end` of a [`Run`]."""
    try:
        content = json.loads(state.read_bytes())
        history = [entry for entry in content["log_history"] if isinstance(entry["step"], (int, float))]
        return history, {key: content[key] for key in ("global_step", "max_steps", "epoch") if key in content}
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last: nested too deeply
        raise ValueError(
            f"{state}: not a trainer state in JSON with log_history and steps in it ({error!r}); name the folder of a "
            "run, or of several"
        ) from None


def _read_arguments(folders: Iterable[Path]) -> dict[str, Any]:
    """
    The arguments of a training, from the `training_args.bin` (or `training_args.json`) of the first folder that has
    one; empty if there is none that can be read. Objects in it have stand-ins, so that none of their code runs.
    """
    for folder in folders:
        for name, read in (("training_args.bin", _unpickled), ("training_args.json", json.load)):
            # Absent, damaged, or of another format: then they are not known.
            with suppress(Exception), (folder / name).open("rb") as file:
                arguments = read(file)
                optim = arguments.get("optim", "")
                # A member of an Enum is pickled by value or by name, and adams by a function without arguments.
                parts = getattr(optim, "args", (optim,))
                return {**arguments, "optim": str(parts[-1] if parts else "adams").lower().rpartition(".")[2]}
    return {}


def _read_dtypes(folders: Iterable[Path]) -> dict[str, int]:
    """Number of scalars of each floating-point dtype ("F32", "BF16") in saved weights, adapters before models, by the
    headers of their files; empty without saved weights."""
    from safetensors import safe_open

    for folder in folders:
        for pattern in ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors"):
            counts: Counter[str] = Counter()
            with suppress(Exception):  # damaged: then they are not known
                for file in folder.glob(pattern):
                    with safe_open(file, framework="numpy") as weights:
                        for tensor in map(weights.get_slice, weights.keys()):
                            counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
                if counts:
                    return {dtype: count for dtype, count in counts.items() if "F" in dtype}
    return {}


def _series(entries: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), (int, float))]


def _growing(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose `step`, a whole number, is above that of all before. Further ones of the same step add what it has
    not: a model is evaluated on several datasets, or again at the end."""
    result: list[dict[str, Any]] = []
    for entry in entries:
        step = int(entry["step"]) if math.isfinite(entry["step"]) else 0
        last = result[-1]["step"] if result else 0
        if step > last:
            result.append({**entry, "step": step})
        elif step == last > 0:
            result[-1] = {**entry, **result[-1]}
    return result


def _is_finite(entry: dict[str, Any]) -> bool:
    return all(math.isfinite(value) for value in entry.values() if isinstance(value, float))


class _Unknown(dict[Any, Any]):
    """Stands for every object in a pickle: its contents are kept, and nothing is imported or called."""

    def __init__(self, *args: Any):
        self.args = args

    def extend(self, items: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _Unknown

    def persistent_load(self, pid: Any) -> None: ...


def _unpickled(file: IO[bytes]) -> dict[str, Any]:
    """The attributes of an object that `torch.save` wrote."""
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return {**vars(_Unpickler(archive.open(name)).load())}
