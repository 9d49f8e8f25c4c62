#!/usr/bin/env python
"""Time of a training step in a Trainer, and the optimizer's share: AdamW and AdamS in turn, on BERT-base and ViT-base.

    python scripts/benchmark_train_step.py                    # CPU; minutes
    python scripts/benchmark_train_step.py --device cuda --batch_size 32 --steps 20 --bf16

Random weights and random inputs: only time is measured. The stock Trainer trains a few steps with AdamW, with AdamS,
and with AdamS after a clipping of its own, one after the other and again; a step is what lies between
`on_step_begin` and `on_step_end`, the optimizer is clipping and `step()`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.benchmark import timer  # waits for the accelerator
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_swd  # noqa: E402


class ClipsByItself(Trainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


BASELINE = "Trainer, adamw_torch_fused"
RUNS = {
    BASELINE: (Trainer, {"optim": "adamw_torch_fused"}),
    "Trainer, adams": (Trainer, {"optim": "adams", "optim_args": "reference_steps=10"}),
    "Trainer that clips by itself, adams": (ClipsByItself, {"optim": "adams", "optim_args": "reference_steps=10"}),
}


def models() -> dict[str, tuple[type, object, dict]]:
    tokens = torch.randint(1000, 30000, (128,))
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor(0)}
    image = {"pixel_values": torch.randn(3, 224, 224), "labels": torch.tensor(0)}
    return {
        "bert-base": (BertForSequenceClassification, BertConfig(), text),
        "vit-base": (ViTForImageClassification, ViTConfig(), image),
    }


class Stopwatch(TrainerCallback):
    """Milliseconds of every step, and of clipping and `step()` in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.shares: list[float] = []
        self._optimizer = 0.0

    def around(self, function):
        @functools.wraps(function)  # also its module: the schedule defers clipping in methods of transformers only
        def timed(*args, **kwargs):
            start = timer()
            result = function(*args, **kwargs)
            self._optimizer += timer() - start
            return result

        return timed

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.step = self.around(optimizer.step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._start, self._optimizer = timer(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(1e3 * (timer() - self._start))
        self.shares.append(1e3 * self._optimizer)


def run(cls: type, config: object, sample: dict, trainer_class: type, settings: dict, arguments) -> Stopwatch:
    torch.manual_seed(0)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=cls(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps + 1,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=1e-5,
                weight_decay=0.01,
                use_cpu=arguments.device == "cpu",
                bf16=arguments.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=[sample] * arguments.batch_size * (arguments.steps + 1),
            callbacks=[stopwatch],
        )
        trainer._clip_grad_norm = stopwatch.around(trainer._clip_grad_norm)
        trainer.train()
    del stopwatch.steps[0], stopwatch.shares[0]  # the optimizer allocates its state
    return stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of every run, after one that warms up (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each run is repeated (default 3)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--name", help="of the files (default: train-step-DEVICE-DATE)")
    arguments = parser.parse_args()

    rows, lines = [], []
    for model, task in models().items():
        watches: dict[str, list[Stopwatch]] = {name: [] for name in RUNS}
        for round_ in range(arguments.rounds):
            for name, (trainer_class, settings) in RUNS.items():
                print(f"{model}, {name}, round {round_ + 1} of {arguments.rounds} ...", flush=True)
                watches[name].append(run(*task, trainer_class, settings, arguments))
        lines += ["", f"## {model}, batch of {arguments.batch_size}", ""]
        lines += ["| run | step, ms | times AdamW | clipping and optimizer, ms | times AdamW | share of the step |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        medians = {}
        for name, group in watches.items():
            medians[name] = [
                [statistics.median(getattr(watch, kind)) for watch in group] for kind in ("steps", "shares")
            ]
            ratios = [
                statistics.median(a / b for a, b in zip(mine, base, strict=True))
                for mine, base in zip(medians[name], medians[BASELINE], strict=True)
            ]
            step, share = (statistics.median(values) for values in medians[name])
            row = {
                "model": model,
                "run": name,
                "step_ms": step,
                "step_ratio": ratios[0],
                "optimizer_ms": share,
                "optimizer_ratio": ratios[1],
                "optimizer_share": share / step,
            }
            rows.append(row)
            times = f"{step:.1f} | {ratios[0]:.3f} | {share:.1f} | {ratios[1]:.2f}"
            lines.append(f"| {name} | {times} | {100 * share / step:.1f} % |")

    kind = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    name = arguments.name or f"train-step-{kind.lower().replace(' ', '-')}-{datetime.date.today().isoformat()}"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with (arguments.output_dir / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    head = [
        f"# Training step: {name}",
        "",
        f"- Python {platform.python_version()}, torch {torch.__version__}, hf_swd {hf_swd.__version__}, "
        f"{torch.get_num_threads()} threads, {'bf16 autocast' if arguments.bf16 else 'float32'}",
        f"- batch {arguments.batch_size}, {arguments.steps} steps, {arguments.rounds} rounds, "
        "clipping at 1.0 (the Trainer's default); medians over steps, then over rounds; ratios within a round",
    ]
    text = "\n".join(head + lines) + "\n"
    (arguments.output_dir / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
