"""The paper's experiment: ResNet18 or VGG16 on CIFAR-10 with AdamS, AdamW, Adam and SGD.

    python examples/comparisons/reproduce_cifar10.py --model resnet18 --optimizers adams adamw adam sgd \\
        --seeds 0 1 2 --jobs 4 --mixed_precision bf16 --compile --output_dir outputs/cifar10-resnet18

That is the full experiment, for one GPU: test error, gradient norm, effective decay. In pieces of at most 9 minutes:
add `--max_minutes 9` and give the same command again and again. The images come from the Hub, or from a file with
`--data cifar-10-binary.tar.gz` (the folder it unpacks to, or an .npz file).

On a CPU, at a scale that finishes:

    python examples/comparisons/reproduce_cifar10.py --model resnet8 --width 8 --train_images 5000 --epochs 30 \\
        --test_every 3 --grad_norm_every 3 --grad_norm_images 2000 --optimizers adams adamw adamw:0.05 adam sgd \\
        --output_dir outputs/cifar10-small

Every run has a folder in OUTPUT_DIR: settings.json, metrics.jsonl (a line an epoch) and, until it is finished,
checkpoint.pt. The finished comparison is results.csv, results.md and plot.png. Called again, it goes on where it was
interrupted (on a CPU with the same numbers).

Setting of the authors' demo: batch 128, 200 epochs, learning rate x 0.1 after 40 % and 80 % of them, weight decay on
all parameters, crops and mirroring, no clipping. The gradient norm is that of the mean training loss, without weight
decay and augmentation, over a fixed subset, in float32, with batch norm over batches of 1000. Since with batch norm it
scales like 1/||w||, ||w|| (of the parameters with two or more dimensions) and the product of both stand beside it.

Source: Xie et al., *On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them*, NeurIPS 2023, arXiv
2011.11152.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch
from accelerate import Accelerator
from cifar10_data import augment, load_cifar10, normalise, random_subset
from cifar10_models import MODELS, WIDTH
from cifar10_report import plot, result_of, scale_of, table
from cifar10_runs import FULL_EPOCHS, OPTIMIZERS, Optimizer, Run, replace
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from tqdm import tqdm


GRADIENT_BATCH = 1000  # batch norm takes its statistics over these
TEST_BATCH = 250


def learning_rate(base: float, epoch: int, epochs: int) -> float:
    """Of an epoch, counted from 0: times 0.1 after 40 % and again after 80 % of the epochs."""
    return base * 0.1 ** sum(epoch >= math.ceil(part * epochs / 5) for part in (2, 4))


def gradient_norm(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = GRADIENT_BATCH) -> float:
    """2-norm of the mean loss's gradient, with batch norm over each batch; drops the gradients, no more."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training = model.training
    model.train().zero_grad()
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        (F.cross_entropy(model(normalise(x)), y, reduction="sum") / len(labels)).backward()
    norm = get_total_norm([p.grad for p in model.parameters()]).item()
    model.train(was_training).zero_grad()
    for buffer, value in buffers:
        buffer.copy_(value)
    return norm


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor, accelerator: Accelerator) -> float:
    """In %."""
    model.eval()
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
        with accelerator.autocast():
            wrong += (model(normalise(x)).argmax(1) != y).sum()
    return 100 * wrong.item() / len(labels)


def effective_decay(optimizer: torch.optim.Optimizer) -> float | None:
    """Decoupled decay of the last step; an L2 term in the gradient has none."""
    return float(optimizer.param_groups[0]["weight_decay"]) if isinstance(optimizer, torch.optim.AdamW) else None


def train(run: Run, deadline: float = math.inf) -> Iterator[dict]:
    """Goes on with a run, to its end or until `deadline` (of `time.time()`) comes; yields the row of each epoch."""
    arguments = run.arguments
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    data = load_cifar10(arguments.data)
    subset = random_subset(len(data["train"][1]), arguments.train_images)
    images, labels = (tensor[subset].to(accelerator.device) for tensor in data["train"])
    test_split = [tensor.to(accelerator.device) for tensor in data["test"]]
    fixed = random_subset(len(labels), arguments.grad_norm_images).to(accelerator.device)

    torch.manual_seed(run.seed)
    model = MODELS[arguments.model](arguments.width).to(accelerator.device, memory_format=torch.channels_last)
    if arguments.compile:
        torch.compiler.reset()  # the models of earlier runs count towards dynamo's limit
    compiled = torch.compile(model) if arguments.compile else model
    optimizer = run.optimizer.build(model, arguments.reference_steps)
    generator = torch.Generator(accelerator.device).manual_seed(run.seed)

    metrics, checkpoint = run.folder / "metrics.jsonl", run.folder / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["epoch"]
    rows = run.rows()[:start]
    replace(metrics, lambda temporary: temporary.write_text("".join(json.dumps(row) + "\n" for row in rows)))

    def save(epoch: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        replace(checkpoint, lambda temporary: torch.save({**state, "epoch": epoch}, temporary))

    seconds = 0.0
    for epoch in range(start, arguments.epochs):
        begin = time.time()
        if begin + seconds > deadline:
            if epoch % arguments.checkpoint_every and epoch > start:
                save(epoch)
            return
        lr = learning_rate(run.optimizer.lr, epoch, arguments.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        order = torch.randperm(len(labels), generator=generator, device=accelerator.device)
        epoch_images = augment(images[order], generator) if arguments.augmentation else images[order]
        total_loss = torch.zeros((), device=accelerator.device)
        wrong = torch.zeros_like(total_loss)
        size = arguments.batch_size
        for x, y in zip(epoch_images.split(size), labels[order].split(size), strict=True):
            with accelerator.autocast():  # a smaller last batch would be compiled once more
                logits = (compiled if len(y) == size else model)(normalise(x))
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total_loss += loss.detach() * len(y)
            wrong += (logits.detach().argmax(1) != y).sum()
        del epoch_images
        matrices = [p.detach() for p in model.parameters() if p.dim() >= 2]
        last = epoch + 1 == arguments.epochs
        row = {
            "epoch": epoch + 1,
            "test_error": None,
            "train_loss": total_loss.item() / len(labels),
            "train_error": 100 * wrong.item() / len(labels),
            "lr": lr,
            "effective_decay": effective_decay(optimizer),
            "weight_norm": get_total_norm(matrices).item(),
            "grad_norm": None,
            "grad_norm_times_weight_norm": None,
        }
        if last or (epoch + 1) % arguments.test_every == 0:
            row["test_error"] = test_error(model, *test_split, accelerator)
        if last or (epoch + 1) % arguments.grad_norm_every == 0:
            row["grad_norm"] = gradient_norm(model, images[fixed], labels[fixed])
            row["grad_norm_times_weight_norm"] = row["grad_norm"] * row["weight_norm"]
        seconds = row["seconds"] = time.time() - begin
        with metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if (epoch + 1) % arguments.checkpoint_every == 0 and not last:
            save(epoch + 1)
        yield row
    checkpoint.unlink(missing_ok=True)


def work(run: Run, deadline: float) -> None:
    """The main function of a worker, which ends when its parent is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    for _ in train(run, deadline):
        pass


def in_workers(waiting: list[Run], jobs: int, deadline: float, show: Callable[[], None]) -> None:
    """Trains each run in a process of its own, `jobs` at a time."""
    context = multiprocessing.get_context("spawn")
    waiting, workers = [*waiting], {}
    try:
        while workers or (waiting and time.time() < deadline):
            while waiting and len(workers) < jobs and time.time() < deadline:
                run = waiting.pop(0)
                workers[run] = context.Process(target=work, args=(run, deadline))
                workers[run].start()
            wait([worker.sentinel for worker in workers.values()], timeout=1)
            show()
            for run, worker in [*workers.items()]:
                if worker.exitcode is not None:
                    del workers[run]
                    if worker.exitcode:
                        raise RuntimeError(f"{run.name} ended with status {worker.exitcode}; its error stands above")
    finally:
        for worker in workers.values():  # after an error; what they have done is in their checkpoints
            worker.terminate()


def execute(runs: list[Run], jobs: int, deadline: float) -> None:
    """Trains what is not finished, and shows the epochs that are done."""
    epochs = runs[0].arguments.epochs
    waiting = [run for run in runs if len(run.rows()) < epochs]
    initial = sum(len(run.rows()) for run in runs)
    with tqdm(total=len(runs) * epochs, initial=initial, unit="epoch") as progress:

        def show() -> None:
            lengths = [len(run.rows()) for run in runs]
            progress.set_postfix_str(f"{lengths.count(epochs)}/{len(runs)} runs", refresh=False)
            progress.update(sum(lengths) - progress.n)

        if jobs > 1:
            in_workers(waiting, jobs, deadline, show)
        else:
            for run in waiting:
                for _ in train(run, deadline):
                    show()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="hub", help="hub, cifar-10-binary.tar.gz, the folder in it, or an .npz file")
    add("--model", choices=MODELS, default="resnet18")
    add("--width", type=int, default=WIDTH, help="channels of the first stage")
    every = [*map(Optimizer.parse, OPTIMIZERS)]
    add("--optimizers", type=Optimizer.parse, nargs="+", default=every, metavar="NAME[:WEIGHT_DECAY[:LR]]")
    add("--reference_steps", type=int, default=0, help="of AdamS; 0 is the paper's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=FULL_EPOCHS)
    add("--batch_size", type=int, default=128)
    add("--train_images", type=int, help="train on a fixed random subset of so many")
    add("--no_augmentation", dest="augmentation", action="store_false")
    add("--grad_norm_images", type=int, default=10_000, help="size of the fixed subset for the gradient norm, at most")
    add("--grad_norm_every", type=int, default=1, help="epochs from one to the next; the last always has one")
    add("--test_every", type=int, default=1, help="epochs from one test error to the next")
    add("--mixed_precision", choices=("no", "bf16"), default="no")
    add("--compile", action="store_true", help="use torch.compile for the training steps")
    add("--jobs", type=int, default=1, help="runs at a time, all on one device")
    add("--num_threads", type=int, help="CPU threads of each run")
    add("--max_minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    add("--checkpoint_every", type=int, default=10, help="epochs")
    add("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    positive = ("width", "epochs", "batch_size", "train_images", "grad_norm_images", "grad_norm_every", "jobs")
    for name in (*positive, "test_every", "num_threads", "max_minutes", "checkpoint_every"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} {value}: expected a positive number")
    if arguments.reference_steps < 0:
        parser.error(f"--reference_steps {arguments.reference_steps}: expected at least 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: start with `python`, not with a launcher, and see --jobs"
        )
    arguments.optimizers = [*dict.fromkeys(arguments.optimizers)]
    arguments.seeds = [*dict.fromkeys(arguments.seeds)]
    return arguments


def main() -> None:
    deadline = time.time()
    arguments = parse_arguments()
    deadline += 60 * arguments.max_minutes
    # Seed by seed, so that an interrupted comparison has all optimizers of the first seeds.
    runs = [Run(optimizer, seed, arguments) for seed in arguments.seeds for optimizer in arguments.optimizers]
    num_train = len(random_subset(len(load_cifar10(arguments.data)["train"][1]), arguments.train_images))
    for run in runs:
        run.claim()
    execute(runs, arguments.jobs, deadline)
    unfinished = [run for run in runs if len(run.rows()) < arguments.epochs]
    if unfinished:
        print(
            f"stopped after {arguments.max_minutes:g} minutes: {len(unfinished)} of {len(runs)} runs are not "
            "finished; the same command goes on with them"
        )
        return
    results = [result_of(run) for run in runs]
    with (arguments.output_dir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    scale = scale_of(arguments, num_train)
    text = table(runs, results, scale)
    (arguments.output_dir / "results.md").write_text(text)
    print(text)
    written = "results.csv, results.md"
    try:
        plot(runs, arguments.output_dir / "plot.png", scale)
        written += ", plot.png"
    except ImportError as error:  # on a machine that has only what training needs
        print(f"no plot.png ({error}): the same command draws it where matplotlib is installed")
    print(f"{arguments.output_dir}: {written}")


if __name__ == "__main__":
    main()
