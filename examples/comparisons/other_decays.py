"""Runs an example script with forms of weight decay that the package does not have, to compare them.

    python examples/comparisons/other_decays.py language_modeling/run_clm.py --optim adamw_torch_fused \\
        --optim_args "power=-0.5,reference_steps=100" --weight_decay 2 ...

and, over weight decays and seeds, through `compare_optimizers.py --optimizer decay:power=-0.5,reference_steps=100 2`.

`--optim_args` are `power` (default 0) and `reference_steps` K: the decay of a step is the weight decay times
(rms / rms at step K)^power, and the weight decay itself up to step K. rms is the root of the mean of Adam's
bias-corrected second moment over all parameters: power=-1 is AdamS, power=0 is AdamW. And `elements`: `all` (default);
`cautious` (arXiv 2510.12402, algorithm 1), only those that the update of this step moves towards zero; `random`,
the control: as many of each tensor, drawn anew at each step.

Written with the hooks of torch's optimizers, for one process and float32; every step keeps a copy of the weights.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


class Decay:
    """Sets the decay of each step of a torch.optim.AdamW; where it is not of all elements, decays after the step."""

    def __init__(
        self, optimizer: torch.optim.AdamW, *, power: float, reference_steps: int, elements: str, seed: int
    ) -> None:
        if elements not in ("all", "cautious", "random"):
            raise ValueError(f"optim_args elements={elements!r}: expected all, cautious or random")
        self.power, self.reference_steps, self.elements = power, reference_steps, elements
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        self.step, self.mean, self.reference_rms, self.factor = 0, 0.0, 0.0, 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: dict[torch.Tensor, torch.Tensor] = {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @property
    def effective(self) -> float:
        return max(self.weight_decays) * self.factor

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        beta2 = optimizer.param_groups[0]["betas"][1]
        square = sum(p.grad.double().square().sum().item() for p in params)
        self.step += 1
        self.mean = beta2 * self.mean + (1 - beta2) * square / sum(p.numel() for p in params)
        rms = (self.mean / (1 - beta2**self.step)) ** 0.5
        if self.step <= self.reference_steps:
            self.reference_rms = rms
        self.factor = (rms / self.reference_rms) ** self.power if self.reference_rms else 1.0
        for group, weight_decay in zip(optimizer.param_groups, self.weight_decays, strict=True):
            group["weight_decay"] = weight_decay * self.factor if self.elements == "all" else 0.0
        if self.elements != "all":
            self.weights = {p: p.detach().clone() for p in params}

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.elements == "all":
            return
        for group, weight_decay in zip(optimizer.param_groups, self.weight_decays, strict=True):
            if not weight_decay:
                continue
            for p in group["params"]:
                if p.grad is not None:
                    decayed = (optimizer.state[p]["exp_avg"] * self.weights[p] >= 0).float()
                    if self.elements == "random":
                        decayed = torch.rand(p.shape, generator=self.generator) < decayed.mean()
                    p.sub_(self.weights[p] * decayed, alpha=group["lr"] * weight_decay * self.factor)


def install() -> None:
    """Every Trainer of this process puts its `optim_args` on the AdamW that it builds."""
    build, log = Trainer.create_optimizer, Trainer.log

    def create_optimizer(trainer: Trainer, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = build(trainer, *args, **kwargs)
        if not hasattr(trainer, "other_decay"):
            given = dict(item.split("=") for item in (trainer.args.optim_args or "").split(",") if item)
            trainer.other_decay = Decay(
                optimizer,
                power=float(given.pop("power", 0)),
                reference_steps=int(given.pop("reference_steps", 0)),
                elements=given.pop("elements", "all"),
                seed=trainer.args.seed,
            )
            if given:
                raise ValueError(f"optim_args {', '.join(given)}: expected power, reference_steps, elements")
        return optimizer

    def with_decay(trainer: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["swd/weight_decay"] = trainer.other_decay.effective
        log(trainer, logs, *args, **kwargs)

    Trainer.create_optimizer, Trainer.log = create_optimizer, with_decay


if __name__ == "__main__":
    # As if the script had been started by itself; its path is one in examples/.
    sys.argv[:2] = [str(Path(__file__).resolve().parents[1] / sys.argv[1])]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")
