"""CIFAR-10 as tensors: from the Hub, the binary archive or an .npz file; augmentation of whole tensors."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


HUB_NAME = "uoft-cs/cifar10"
FOLDER = "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
# Of the training images, per channel, for pixels in [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
PADDING = 4

Split = tuple[Tensor, Tensor]  # images, uint8 (count, 32, 32, 3), and labels, int64 (count,)


@lru_cache(maxsize=1)
def load_cifar10(data: str = "hub") -> dict[str, Split]:
    """
    Loads the splits `train` and `test`.

    Args:
        data (`str`, defaults to "hub"): "hub" (needs `datasets`), or a path: cifar-10-binary.tar.gz, the folder it
            unpacks to, or an .npz file with x_train, y_train, x_test, y_test.

    Returns:
        `dict[str, tuple[Tensor, Tensor]]`: of each split the images, uint8 of shape (count, 32, 32, 3), and the
        labels, int64.

    Raises:
        FileNotFoundError, ValueError: nothing at that path, or not CIFAR-10 in one of these forms.
        ImportError: "hub" without `datasets`.
    """
    if data == "hub":
        arrays = _read_hub(HUB_NAME)
    elif not Path(data).exists():
        raise FileNotFoundError(
            f"data={data!r} does not exist; expected 'hub', an .npz file, cifar-10-binary.tar.gz "
            f"or the folder {FOLDER}"
        )
    elif Path(data).is_dir():
        folder = Path(data) / FOLDER if (Path(data) / FOLDER).is_dir() else Path(data)
        arrays = _read_batches(lambda name: (folder / name).open("rb"), data)
    elif Path(data).suffix == ".npz":
        arrays = _read_npz(data)
    elif tarfile.is_tarfile(data):
        with tarfile.open(data) as archive:
            arrays = _read_batches(lambda name: archive.extractfile(f"{FOLDER}/{name}"), data)
    else:
        raise ValueError(f"data={data!r}: expected 'hub', an .npz file, cifar-10-binary.tar.gz or the folder {FOLDER}")
    for split, (images, labels) in arrays.items():
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or not len(labels):
            raise ValueError(
                f"data={data!r}: the {split} images are {images.dtype} of shape {images.shape} "
                f"with {len(labels)} labels; expected "
                f"uint8 of shape ({len(labels) or 'count'}, 32, 32, 3)"
            )
    return {
        split: (torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
        for split, (images, labels) in arrays.items()
    }


def _read_hub(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"data='hub' needs `datasets`: pip install datasets, or name a file with --data ({error})"
        ) from None
    return {
        split: (np.stack([np.asarray(image.convert("RGB")) for image in part["img"]]), np.asarray(part["label"]))
        for split, part in load_dataset(name).items()
    }


def _read_npz(data: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with np.load(data) as file:
        missing = {f"{array}_{split}" for array in "xy" for split in FILES} - set(file)
        if missing:
            raise ValueError(
                f"data={data!r} has the arrays {sorted(file)}; expected x_train, y_train, x_test, y_test as well"
            )
        return {split: (file[f"x_{split}"], file[f"y_{split}"].reshape(-1)) for split in FILES}


def _read_batches(open_: Callable[[str], IO[bytes]], data: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every image a byte for the class, then the red, the green and the blue pixels, row by row."""

    def read(name: str) -> np.ndarray:
        try:
            with open_(name) as file:
                return np.frombuffer(file.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"data={data!r}: cannot read {FOLDER}/{name} ({error!r}); unpack or download it again"
            ) from error

    rows = {split: np.concatenate([*map(read, names)]) for split, names in FILES.items()}
    return {
        split: (part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), part[:, 0]) for split, part in rows.items()
    }


def random_subset(count: int, size: int | None) -> Tensor:
    """Sorted indices of `size` of `count` samples, the same in every run; all for `None` or a size not smaller."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count if size is None else size].sort().values


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """
    Shifts every image by up to 4 pixels in each direction, zeros coming in, and mirrors half of them.

    Args:
        images (`Tensor`): of shape (count, height, width, channels), not normalised.
        generator (`torch.Generator`): on the device of the images.

    Returns:
        `Tensor`: of the same shape.
    """
    count, height, width, _ = images.shape
    draw = {"generator": generator, "device": images.device}
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows = torch.randint(2 * PADDING + 1, (count, 1), **draw) + torch.arange(height, device=images.device)
    columns = torch.randint(2 * PADDING + 1, (count, 1), **draw) + torch.arange(width, device=images.device)
    columns = torch.where(torch.randint(2, (count, 1), **draw) == 1, columns.flip(1), columns)
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of pixels from 0 to 255. Kept, since a copy to an accelerator in every step would make the host wait."""
    return tuple(255 * torch.tensor(values, device=device) for values in (MEAN, STD))


def normalise(images: Tensor) -> Tensor:
    """From uint8 NHWC to standardised float32 NCHW, in channels-last memory."""
    mean, std = _statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)
