"""examples/comparisons/reproduce_cifar10.py: data, models, gradient norm, interruption, the whole script."""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reproduce_cifar10
import torch
from cifar10_data import FILES, FOLDER, augment, load_cifar10, normalise, random_subset
from cifar10_models import MODELS, vgg16
from reproduce_cifar10 import Optimizer, Run, gradient_norm, learning_rate, train
from torch import nn


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "comparisons" / "reproduce_cifar10.py"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """40 training and 24 test images; the class is the brightest of ten rows."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 24)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        images[np.arange(count), 10 + labels] += 100
        arrays |= {f"x_{split}": images, f"y_{split}": labels.astype(np.uint8)}
    return arrays


@pytest.fixture(scope="module")
def npz(arrays, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    np.savez(path, **arrays)
    return str(path)


def write_batches(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """The files of the binary archive: a byte for the class, then the image with the channels first."""
    folder.mkdir()
    for split, names in FILES.items():
        images = np.array_split(arrays[f"x_{split}"].transpose(0, 3, 1, 2).reshape(-1, 3072), len(names))
        labels = np.array_split(arrays[f"y_{split}"], len(names))
        for name, x, y in zip(names, images, labels, strict=True):
            (folder / name).write_bytes(np.column_stack([y, x]).tobytes())


def assert_same_data(found, arrays) -> None:
    for split, (images, labels) in found.items():
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), arrays[f"x_{split}"])
        assert np.array_equal(labels.numpy(), arrays[f"y_{split}"])
    assert set(found) == {"train", "test"}


def arguments(output_dir: Path, data: str, **changes) -> argparse.Namespace:
    settings = {
        "data": data,
        "model": "resnet18",
        "width": 8,  # with fewer, oneDNN of torch 2.13 corrupts memory on CPUs with AVX2 alone
        "optimizers": [Optimizer.parse("adams")],
        "reference_steps": 0,
        "seeds": [0],
        "epochs": 5,
        "batch_size": 16,
        "train_images": None,
        "augmentation": True,
        "grad_norm_images": 24,
        "grad_norm_every": 2,
        "test_every": 1,
        "mixed_precision": "no",
        "compile": False,
        "num_threads": None,
        "checkpoint_every": 2,
        "output_dir": output_dir,
    }
    return argparse.Namespace(**{**settings, **changes})


def run_of(output_dir: Path, data: str, spec: str = "adams", seed: int = 0, **changes) -> Run:
    run = Run(Optimizer.parse(spec), seed, arguments(output_dir, data, **changes))
    run.claim()
    return run


# Data


def test_npz_archive_and_folder_hold_the_same(arrays, npz, tmp_path):
    assert_same_data(load_cifar10(npz), arrays)
    write_batches(arrays, tmp_path / FOLDER)
    assert_same_data(load_cifar10(str(tmp_path / FOLDER)), arrays)
    assert_same_data(load_cifar10(str(tmp_path)), arrays)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / FOLDER, FOLDER)
    assert_same_data(load_cifar10(str(tmp_path / "cifar-10-binary.tar.gz")), arrays)


def test_data_of_the_form_on_the_hub(arrays, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    for split in FILES:
        columns = {"img": list(arrays[f"x_{split}"]), "label": arrays[f"y_{split}"].tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr("cifar10_data.HUB_NAME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    load_cifar10.cache_clear()
    assert_same_data(load_cifar10("hub"), arrays)


def test_unusable_data_are_named(arrays, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*expected 'hub', an \.npz file"):
        load_cifar10(str(tmp_path / "nowhere"))
    np.savez(tmp_path / "keys.npz", x_train=arrays["x_train"])
    with pytest.raises(ValueError, match=r"keys\.npz.*x_train, y_train, x_test, y_test"):
        load_cifar10(str(tmp_path / "keys.npz"))
    np.savez(tmp_path / "shape.npz", **{**arrays, "x_test": arrays["x_test"].transpose(0, 3, 1, 2)})
    with pytest.raises(ValueError, match=r"test images.*\(24, 3, 32, 32\).*expected uint8 of shape \(24, 32, 32, 3\)"):
        load_cifar10(str(tmp_path / "shape.npz"))
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.tar\.gz.*cifar-10-binary\.tar\.gz"):
        load_cifar10(str(tmp_path / "text.tar.gz"))
    write_batches(arrays, tmp_path / FOLDER)
    (tmp_path / FOLDER / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match="cannot read .*data_batch_3"):
        load_cifar10(str(tmp_path / FOLDER))


def test_a_file_that_is_cut_off_is_named(arrays, tmp_path):
    write_batches(arrays, tmp_path / FOLDER)
    file = tmp_path / FOLDER / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot read .*test_batch.bin"):
        load_cifar10(str(tmp_path / FOLDER))


def test_subset_is_the_same_every_time():
    assert torch.equal(random_subset(50, 20), random_subset(50, 20))
    assert len(random_subset(50, 20).unique()) == 20
    assert torch.equal(random_subset(50, None), torch.arange(50))
    assert torch.equal(random_subset(50, 80), torch.arange(50))


def test_augmentation_is_every_shift_by_up_to_4_mirrored_or_not():
    image = torch.randint(1, 256, (32, 32, 3), dtype=torch.uint8)
    padded = torch.zeros(40, 40, 3, dtype=torch.uint8)
    padded[4:36, 4:36] = image
    crops = {(dy, dx): padded[dy : dy + 32, dx : dx + 32] for dy in range(9) for dx in range(9)}
    allowed = {crop.numpy().tobytes(): (*shift, False) for shift, crop in crops.items()}
    allowed |= {crop.flip(1).numpy().tobytes(): (*shift, True) for shift, crop in crops.items()}
    images = image.expand(3000, -1, -1, -1).clone()
    before = images.clone()

    out = augment(images, torch.Generator().manual_seed(3))

    seen = [allowed[each.numpy().tobytes()] for each in out]  # a KeyError for anything else
    assert torch.equal(images, before)
    assert len(set(seen)) == len(allowed) == 162
    assert np.mean([mirrored for *_, mirrored in seen]) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(out, augment(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(out, augment(images, torch.Generator().manual_seed(4)))


def test_normalised_images_are_standardised_and_channels_last():
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    out = normalise(images)
    assert out.shape == (2, 3, 32, 32) and out.is_contiguous(memory_format=torch.channels_last)
    expected = (images[1, 5, 7, 2].item() / 255 - 0.4465) / 0.2010
    assert out[1, 2, 5, 7].item() == pytest.approx(expected, rel=1e-5)


# Models, settings


def test_models_have_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in MODELS["resnet18"]().parameters()) == 11_173_962
        assert sum(p.numel() for p in vgg16().parameters()) == 14_728_266
    for build in MODELS.values():
        assert build(2)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_learning_rate_falls_after_40_and_80_percent():
    rates = [learning_rate(0.1, epoch, 200) for epoch in range(200)]
    assert [epoch for epoch in range(1, 200) if rates[epoch] != rates[epoch - 1]] == [80, 160]
    assert [rates[0], rates[80], rates[160]] == pytest.approx([0.1, 0.01, 0.001])
    assert [learning_rate(1.0, epoch, 5) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert learning_rate(1.0, 0, 1) == 1.0


def test_optimizer_specs():
    assert Optimizer.parse("adamw") == Optimizer("adamw", 0.5, 1e-3) and Optimizer.parse("adamw").is_default
    assert Optimizer.parse("sgd") == Optimizer("sgd", 5e-4, 0.1)
    other = Optimizer.parse("adamw:0.05:2e-3")
    assert other == Optimizer("adamw", 0.05, 2e-3) and not other.is_default and other.name == "adamw-0.05-lr0.002"
    for spec in ("lion", "adamw:much", "adamw:-1", "adamw:1:0", "adamw:1:1e-3:4", "adamw:", "adamw:nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected NAME\[:WEIGHT_DECAY\[:LR\]\]"):
            Optimizer.parse(spec)


@pytest.mark.parametrize("kind", ["adams", "adamw", "adam", "sgd"])
def test_optimizers_decay_everything_in_one_group(kind):
    model = nn.Linear(2, 2)
    optimizer = Optimizer.parse(kind).build(model, reference_steps=0)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2
    assert group["weight_decay"] == (0.5 if kind == "adamw" else 5e-4)
    if kind == "sgd":
        assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    else:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)
    assert (reproduce_cifar10.effective_decay(optimizer) is None) == (kind in ("adam", "sgd"))


def test_a_run_with_other_settings_is_refused(npz, tmp_path):
    run_of(tmp_path, npz)
    run_of(tmp_path, npz, checkpoint_every=1)  # has no influence on the numbers
    with pytest.raises(ValueError, match="epochs=5 there, 6 here.*--output_dir"):
        run_of(tmp_path, npz, epochs=6)
    with pytest.raises(ValueError, match="reference_steps=0 there, 3 here"):
        run_of(tmp_path, npz, reference_steps=3)


# Measuring, going on


def test_gradient_norm_is_right_and_changes_nothing():
    # A deep ReLU network of this size would be an ill-conditioned yardstick: 0.1 % between float32 and float64.
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (40,))
    model(normalise(images))  # running statistics that are not those of the start
    model.eval()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()

    found = gradient_norm(model, images, labels, batch_size=16)

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)

    exact = copy.deepcopy(model).double().train()
    total = [torch.zeros_like(p) for p in exact.parameters()]
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):
        log_probabilities = exact(normalise(images[part]).double()).log_softmax(1)
        loss = -log_probabilities[torch.arange(len(labels[part])), labels[part]].sum() / 40
        for sum_, gradient in zip(total, torch.autograd.grad(loss, exact.parameters()), strict=True):
            sum_ += gradient
    expected = sum((gradient**2).sum() for gradient in total).sqrt().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spec", ["adams", "sgd"])
def test_an_interrupted_run_ends_with_the_same_bits(npz, tmp_path, spec):
    whole = run_of(tmp_path / "whole", npz, spec)
    yielded = list(train(whole))
    assert yielded == whole.rows() and [row["epoch"] for row in yielded] == [1, 2, 3, 4, 5]
    assert not (whole.folder / "checkpoint.pt").exists()

    run = run_of(tmp_path / "pieces", npz, spec)
    list(itertools.islice(train(run), 1))  # before the first checkpoint
    list(itertools.islice(train(run), 3))  # an epoch after one
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "test_er')  # in the middle of writing
    assert torch.load(run.folder / "checkpoint.pt")["epoch"] == 2
    assert [row["epoch"] for row in train(run)] == [3, 4, 5]
    for row, expected in zip(run.rows(), yielded, strict=True):
        # AdamS rebuilds its running sums, in float64, from the checkpoint.
        decays = row.pop("effective_decay"), expected.pop("effective_decay")
        assert decays == (None, None) if spec == "sgd" else decays[0] == pytest.approx(decays[1], rel=1e-12)
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}


def test_gradient_norms_do_not_change_the_training(npz, tmp_path):
    often, seldom = (list(train(run_of(tmp_path / str(n), npz, grad_norm_every=n))) for n in (1, 5))
    assert [row["grad_norm"] is None for row in seldom] == [True, True, True, True, False]
    assert all(row["grad_norm"] > 0 for row in often)
    for row, other in zip(often, seldom, strict=True):
        assert row["train_loss"] == other["train_loss"] and row["test_error"] == other["test_error"]
    assert often[-1]["grad_norm"] == seldom[-1]["grad_norm"]


def test_deadline_saves_and_the_same_call_goes_on(npz, tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(reproduce_cifar10, "time", SimpleNamespace(time=lambda: now))
    run = run_of(tmp_path, npz, epochs=3, checkpoint_every=100)
    assert list(train(run, deadline=99.0)) == []
    assert not (run.folder / "checkpoint.pt").exists()
    steps = train(run, deadline=101.0)
    next(steps)
    now = 102.0
    assert list(steps) == []
    assert torch.load(run.folder / "checkpoint.pt")["epoch"] == 1
    assert [row["epoch"] for row in train(run)] == [2, 3]
    assert [row["epoch"] for row in run.rows()] == [1, 2, 3]


def test_metrics_are_those_of_the_model(npz, tmp_path):
    run = run_of(tmp_path, npz, epochs=1, model="vgg16", augmentation=False, batch_size=40)
    (row,) = train(run)
    # One step of full batch: the training loss is that of the initial weights.
    torch.manual_seed(0)
    model = vgg16(8)
    data = load_cifar10(npz)["train"]
    logits = model(normalise(data[0]))
    assert row["train_loss"] == pytest.approx(nn.functional.cross_entropy(logits, data[1]).item(), rel=1e-4)
    assert row["train_error"] == pytest.approx(100 * (logits.argmax(1) != data[1]).float().mean().item(), abs=2.6)
    assert row["grad_norm_times_weight_norm"] == row["grad_norm"] * row["weight_norm"]
    expected = sum((p.detach().double() ** 2).sum() for p in model.parameters() if p.dim() >= 2) ** 0.5
    assert row["weight_norm"] == pytest.approx(expected.item(), rel=0.02)  # one step of Adam later
    assert 0 <= row["test_error"] <= 100 and row["lr"] == 1e-3 and row["effective_decay"] > 5e-4


# The script


def command(output_dir: Path, data: str, *more: str) -> list[str]:
    command = [str(SCRIPT), "--data", data, "--output_dir", str(output_dir), *more]
    command += "--width 8 --epochs 2 --batch_size 16 --grad_norm_images 16 --num_threads 1".split()
    return [*command, "--optimizers", "adams", "adamw:0.05"]


def test_the_whole_comparison(npz, tmp_path, monkeypatch, capsys):
    # One seed, in two processes at a time and as a user starts it.
    done = subprocess.run(
        [sys.executable, *command(tmp_path, npz, "--seeds", "0", "--jobs", "2")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2/2 runs" in done.stderr
    (tmp_path / "results.csv").unlink()
    finished = tmp_path / "resnet18-adams-0.0005-seed0" / "metrics.jsonl"
    before = finished.stat().st_mtime_ns

    # One more: first there is no time for it, then it is done, and nothing is done twice.
    monkeypatch.setattr(sys, "argv", command(tmp_path, npz, "--seeds", "0", "1", "--max_minutes", "1e-9"))
    reproduce_cifar10.main()
    assert "2 of 4 runs are not finished; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()
    monkeypatch.setattr(sys, "argv", command(tmp_path, npz, "--seeds", "0", "1"))
    reproduce_cifar10.main()
    assert finished.stat().st_mtime_ns == before
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [
        f"resnet18-{name}-seed{seed}" for seed in (0, 1) for name in ("adams-0.0005", "adamw-0.05")
    ]
    for row in rows:
        metrics = [json.loads(line) for line in (tmp_path / row["run"] / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in metrics] == [1, 2]
        assert float(row["test_error"]) == metrics[-1]["test_error"]
        assert float(row["best_test_error"]) == min(line["test_error"] for line in metrics)
    assert rows[0]["grad_norm"] != rows[2]["grad_norm"]  # the seeds differ
    text = (tmp_path / "results.md").read_text()
    assert "width 8 instead of 64, 40 training images, shortened to 2 epochs (of 200)" in text
    assert "| AdamS | 0.0005 | " in text and text.count("4.91 ± 0.04") == 1
    assert "| 0.0500 ± 0 | – |" in text  # AdamW 0.05 is not the paper's setting
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_argument_is_named(npz, tmp_path, capsys, monkeypatch):
    for wrong in (["--epochs", "0"], ["--optimizers", "lion"], ["--reference_steps", "-1"]):
        monkeypatch.setattr(sys, "argv", ["reproduce_cifar10.py", "--output_dir", str(tmp_path), *wrong])
        with pytest.raises(SystemExit):
            reproduce_cifar10.parse_arguments()
        assert wrong[1] in (message := capsys.readouterr().err) and "expected" in message
