"""The runs of reproduce_cifar10.py: which optimizer and seed, and the folder that each writes."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hf_swd import AdamS


# Name, weight decay, learning rate; test errors in % of ResNet18 and VGG16 from the paper.
OPTIMIZERS = {
    "adams": ("AdamS", 5e-4, 1e-3, {"resnet18": "4.91 ± 0.04", "vgg16": "6.09 ± 0.11"}),
    "adamw": ("AdamW", 0.5, 1e-3, {"resnet18": "5.08", "vgg16": "6.48"}),
    "adam": ("Adam (L2)", 5e-4, 1e-3, {"resnet18": "6.53", "vgg16": "7.31"}),
    "sgd": ("SGD", 5e-4, 0.1, {"resnet18": "5.01", "vgg16": "6.42"}),
}
FULL_EPOCHS = 200


@dataclass(frozen=True)
class Optimizer:
    kind: str
    weight_decay: float
    lr: float

    @classmethod
    def parse(cls, spec: str) -> Optimizer:
        kind, *numbers = spec.split(":")
        try:
            _, weight_decay, lr, _ = OPTIMIZERS[kind]
            weight_decay, lr = [*map(float, numbers), *(weight_decay, lr)[len(numbers) :]]
            if not (0 <= weight_decay < math.inf and 0 < lr < math.inf):
                raise ValueError
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{spec!r}: expected NAME[:WEIGHT_DECAY[:LR]] with a name of {', '.join(OPTIMIZERS)}, "
                "a weight decay of at least 0 and a positive learning rate, such as adamw:0.05"
            ) from None
        return cls(kind, weight_decay, lr)

    @property
    def is_default(self) -> bool:
        return (self.weight_decay, self.lr) == OPTIMIZERS[self.kind][1:3]

    @property
    def name(self) -> str:
        lr = "" if self.lr == OPTIMIZERS[self.kind][2] else f"-lr{self.lr:g}"
        return f"{self.kind}-{self.weight_decay:g}{lr}"

    @property
    def label(self) -> str:
        lr = "" if self.lr == OPTIMIZERS[self.kind][2] else f", lr {self.lr:g}"
        return f"{OPTIMIZERS[self.kind][0]} {self.weight_decay:g}{lr}"

    def build(self, model: nn.Module, reference_steps: int) -> torch.optim.Optimizer:
        options = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        if self.kind == "adams":
            return AdamS(model.parameters(), reference_steps=reference_steps, **options)
        if self.kind == "sgd":
            return torch.optim.SGD(model.parameters(), momentum=0.9, **options)
        return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[self.kind](model.parameters(), **options)


@dataclass(frozen=True)
class Run:
    optimizer: Optimizer
    seed: int
    arguments: argparse.Namespace = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.arguments.model}-{self.optimizer.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.arguments.output_dir / self.name

    def claim(self) -> None:
        """Makes the folder; a run there with other settings is an error, so that no table mixes two experiments."""
        names = ("model", "width", "epochs", "batch_size", "train_images", "augmentation", "mixed_precision")
        names += ("grad_norm_images", "grad_norm_every", "test_every")
        settings = {"optimizer": self.optimizer.kind, "weight_decay": self.optimizer.weight_decay}
        settings |= {"lr": self.optimizer.lr, "seed": self.seed}
        settings |= {name: getattr(self.arguments, name) for name in names}
        settings["reference_steps"] = self.arguments.reference_steps if self.optimizer.kind == "adams" else 0
        path = self.folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text())
            changed = [key for key in settings | found if found.get(key) != settings.get(key)]
            if changed:
                raise ValueError(
                    f"output_dir={str(self.folder.parent)!r} holds the run {self.name} with other settings: "
                    + ", ".join(f"{key}={found.get(key)} there, {settings.get(key)} here" for key in changed)
                    + "; choose another --output_dir, or delete it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=2)))

    def rows(self) -> list[dict]:
        """The epochs that are written; the piece of a line that an interruption left is none."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is whole at any time."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
