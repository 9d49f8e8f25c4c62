"""examples/classification/run_image_classification.py: run for real, on the embedded digits and on a few PNG files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[2]
datasets = pytest.importorskip("datasets", reason="needs the extra: examples")
for name in ("evaluate", "sklearn", "PIL"):
    pytest.importorskip(name, reason="needs the extra: examples")
import run_image_classification as example  # noqa: E402
from embedded_images import build_embedded_images  # noqa: E402
from PIL import Image  # noqa: E402


SHAPE = "image_size=8,patch_size=4,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """`datasets` keeps nothing outside the folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def settings(output_dir: Path, **changes) -> dict:
    common = {
        "embedded": True,
        "config_overrides": SHAPE,
        "output_dir": str(output_dir),
        "do_train": True,
        "do_eval": True,
        "max_steps": 6,
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "adams",
        "learning_rate": 3e-3,
        "weight_decay": 5e-4,
        "max_grad_norm": 0,
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    both = {**common, **changes}
    return {key: value for key, value in both.items() if value is not None}


def run_here(arguments: dict, folder: Path, monkeypatch) -> dict:
    """main() in this process, with its arguments in a JSON file; what it writes to all_results.json."""
    file = folder / "arguments.json"
    file.write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, "argv", ["run_image_classification.py", str(file)])
    example.main()
    return json.loads((Path(arguments["output_dir"]) / "all_results.json").read_text())


def history(folder: Path) -> list[dict]:
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in logs if "loss" in entry]


# --- data and augmentation ---


@pytest.fixture(scope="module")
def digits():
    return build_embedded_images()


def test_embedded_digits_are_split_once_and_for_all(digits):
    assert {split: len(part) for split, part in digits.items()} == {"train": 1197, "validation": 300, "test": 300}
    again = build_embedded_images()
    seen = set()
    for split, part in digits.items():
        images = [image.tobytes() for image in part["image"]]
        assert images == [image.tobytes() for image in again[split]["image"]]
        assert part["label"][:] == again[split]["label"][:]
        counts = np.bincount(part["label"][:], minlength=10) / len(part)
        assert counts.min() > 0.09 and counts.max() < 0.11
        assert seen.isdisjoint(images)
        seen.update(images)
    assert len(seen) == 1797


def test_augmentation_depends_on_seed_epoch_and_index_only(digits):
    processor = example.ViTImageProcessorPil(size={"height": 16, "width": 16})
    numbers = {str(number): number for number in range(10)}
    train = digits["train"].cast_column("image", datasets.Image(mode="RGB"))

    def images(seed=0):
        return example.ImageDataset(train, processor, numbers, example.shift_and_rotate, seed)

    def pixels(dataset, index=5):
        return dataset[index]["pixel_values"]

    dataset = images()
    first = pixels(dataset)
    assert first.shape == (3, 16, 16)
    random.random(), torch.rand(1)
    assert torch.equal(pixels(dataset), first)
    assert torch.equal(pixels(images()), first)
    assert not torch.equal(pixels(images(seed=1)), first)
    dataset.epoch.fill_(1)
    assert not torch.equal(pixels(dataset), first)


def test_digits_are_moved_a_little_and_never_mirrored():
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (2, 6, 6, 10))  # a square left of the middle
    for number in range(50):
        moved = np.asarray(example.shift_and_rotate(image, 16, 16, random.Random(number))).astype(float)[..., 0]
        center = (moved.sum(0) * np.arange(16)).sum() / moved.sum()
        assert 0.5 < center < 6.5


def test_photos_are_cut_to_the_size_of_the_model_and_mirrored_half_of_the_time():
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None], (40, 100, 3))  # brighter to the right
    mirrored, widths = 0, []
    for number in range(200):
        made = np.asarray(example.cut_out_and_mirror(Image.fromarray(ramp), 24, 32, random.Random(number)))
        assert made.shape == (24, 32, 3)
        row = made[0, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        widths.append(abs(row[-1] - row[0]))
    assert 70 < mirrored < 130
    assert (
        min(widths) < 20 and 50 < max(widths) <= 73
    )  # all 40 rows, 73 columns: the largest part with its area and shape


# --- training on the digits ---


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    """Output folder of `python examples/classification/run_image_classification.py arguments.yaml`."""
    folder = tmp_path_factory.mktemp("digits")
    arguments = settings(
        folder / "out", max_steps=None, num_train_epochs=3, save_strategy="steps", save_steps=100, logging_steps=10,
        do_predict=True, report_to="tensorboard", lr_scheduler_type="cosine",
    )  # fmt: skip
    (folder / "arguments.yaml").write_text(json.dumps(arguments))  # a JSON document is a YAML document
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "classification" / "run_image_classification.py"),
            str(folder / "arguments.yaml"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return folder / "out"


def test_digits_are_learned(digits_run):
    results = json.loads((digits_run / "all_results.json").read_text())
    assert results["eval_majority_baseline"] < 0.11
    for split in ("eval", "predict"):
        assert results[f"{split}_accuracy"] > 0.3
        assert results[f"{split}_samples"] == 300
    logs = history(digits_run)
    assert all(entry["swd/weight_decay"] > 0 for entry in logs)
    lines = (digits_run / "predict_results.txt").read_text().splitlines()
    answers = [line.split("\t")[1] for line in lines[1:]]
    labels = build_embedded_images()["test"]["label"]
    right = np.mean([int(answer) == label for answer, label in zip(answers, labels, strict=True)])
    assert right == pytest.approx(results["predict_accuracy"])


def test_output_folder_holds_what_inference_needs(digits_run, digits):
    from transformers import pipeline

    card = (digits_run / "README.md").read_text()
    assert "- hf_swd" in card and "handwritten digits" in card
    assert list(digits_run.glob("runs/**/events*"))
    classify = pipeline("image-classification", model=str(digits_run), device="cpu")
    lines = (digits_run / "predict_results.txt").read_text().splitlines()[1:6]
    for line, image in zip(lines, digits["test"]["image"][:5], strict=True):
        assert line.split("\t")[1] == classify(image)[0]["label"]


def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(digits_run, tmp_path, monkeypatch, caplog):
    """Step 100 is in the middle of the second epoch; what follows depends on shuffling and on augmentation."""
    shutil.copytree(digits_run / "checkpoint-100", tmp_path / "out" / "checkpoint-100")
    arguments = json.loads((digits_run.parent / "arguments.yaml").read_text())
    resumed = run_here({**arguments, "output_dir": str(tmp_path / "out"), "report_to": "none"}, tmp_path, monkeypatch)
    assert "checkpoint-100" in caplog.text
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", digits_run))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    # The checkpoint has the names of the model, which is what the Trainer loads.
    names = example.AutoModelForImageClassification.from_pretrained(digits_run).state_dict().keys()
    assert load_file(digits_run / "checkpoint-100" / "model.safetensors").keys() == names
    uninterrupted = json.loads((digits_run / "all_results.json").read_text())
    assert resumed["predict_loss"] == pytest.approx(uninterrupted["predict_loss"], rel=1e-5)


def test_stock_fused_adamw_and_a_subset(tmp_path, monkeypatch):
    arguments = settings(
        tmp_path / "out", optim="adamw_torch_fused", max_train_samples=40, max_eval_samples=30, do_predict=True,
        max_predict_samples=20, max_steps=3,
    )  # fmt: skip
    results = run_here(arguments, tmp_path, monkeypatch)
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [40, 30, 20]
    assert not [key for entry in history(tmp_path / "out") for key in entry if key.startswith("swd/")]


# --- folders, data sets, checkpoints ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Folders train, validation and test with red and blue images of several sizes, and test_flat without classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6), ("test", 4)):
        for color, channel in (("red", 0), ("blue", 2)):
            (root / split / color).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (20 + number, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / color / f"{number:02}.png")
    (root / "test_flat").mkdir()
    for number, color in enumerate(("red", "blue", "blue")):
        shutil.copy(root / "test" / color / "00.png", root / "test_flat" / f"{number}.png")
    return root


def from_folders(photos: Path, output_dir: Path, **changes) -> dict:
    folders = {"train_dir": str(photos / "train"), "validation_dir": str(photos / "validation")}
    return settings(output_dir, **{"embedded": None, "do_predict": True, "max_steps": 12, **folders, **changes})


@pytest.fixture(scope="module")
def folder_run(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        run_here(from_folders(photos, folder / "out", test_dir=str(photos / "test")), folder, patch)
    return folder / "out"


def test_image_folders(folder_run):
    results = json.loads((folder_run / "all_results.json").read_text())
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [24, 12, 8]
    assert results["eval_accuracy"] == results["predict_accuracy"] == 1.0
    assert json.loads((folder_run / "config.json").read_text())["label2id"] == {"blue": 0, "red": 1}


def test_checkpoint_is_tuned_and_images_without_classes_are_predicted(photos, folder_run, tmp_path, monkeypatch):
    changes = {"model_name_or_path": str(folder_run), "config_overrides": None, "validation_dir": None}
    arguments = from_folders(photos, tmp_path / "out", test_dir=str(photos / "test_flat"), max_steps=1, **changes)
    results = run_here(arguments, tmp_path, monkeypatch)
    assert (results["train_samples"], results["eval_samples"]) == (20, 4)  # a part of the training images
    assert results["predict_samples"] == 3 and "predict_accuracy" not in results
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert lines == ["index\tprediction", "0\tred", "1\tblue", "2\tblue"]


def test_checkpoint_with_other_classes_gets_a_new_head_when_asked(digits_run, photos, tmp_path, monkeypatch):
    changes = {"model_name_or_path": str(digits_run), "config_overrides": None, "do_predict": False, "max_steps": 1}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        run_here(from_folders(photos, tmp_path / "one", **changes), tmp_path, monkeypatch)
    results = run_here(
        from_folders(photos, tmp_path / "two", ignore_mismatched_sizes=True, **changes), tmp_path, monkeypatch
    )
    assert results["eval_samples"] == 12


def test_data_set_with_other_column_names_words_for_classes_and_unknown_test_labels(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")] * 8
    for split, classes in (("train", ["hot", "cold"] * 8), ("test", [None] * 16)):
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
        part = datasets.Dataset.from_dict({"picture": images, "kind": classes}, features=features)
        part.to_parquet(folder / f"{split}.parquet")
    arguments = settings(
        tmp_path / "out", embedded=None, dataset_name=str(folder), image_column_name="picture",
        label_column_name="kind",
        train_val_split=0.25, do_predict=True, max_steps=2,
    )  # fmt: skip
    results = run_here(arguments, tmp_path, monkeypatch)
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [12, 4, 16]
    assert "predict_accuracy" not in results
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"cold": 0, "hot": 1}


# --- wrong input ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "embedded=False; expected exactly one source"),
        ({"embedded": True, "dataset_name": "beans"}, "dataset_name='beans'.*exactly one source"),
        ({"validation_dir": "."}, "train_dir=None.*exactly one source"),
        ({"train_dir": "nowhere"}, "train_dir='nowhere'; expected a folder"),
        ({"embedded": True, "augmentation": "strong"}, "augmentation='strong'; expected one of photos, digits, none"),
        ({"embedded": True, "train_val_split": 1.5}, "train_val_split=1.5; expected a number between 0 and 1"),
        ({"embedded": True, "max_eval_samples": 0}, "max_eval_samples=0; expected at least 1"),
    ],
)
def test_data_arguments_with_a_wrong_value_name_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        example.DataTrainingArguments(**arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config_overrides": "hidden=3"}, "config_overrides='hidden=3': key hidden .*such as hidden_size"),
        ({"config_overrides": "hidden_size"}, "config_overrides='hidden_size': .*such as hidden_size"),
        ({"config_overrides": "patch_size=5"}, "image_size=16 must be a multiple of patch_size=5"),
        ({"model_name_or_path": "folder"}, "config_overrides=.*model_name_or_path='folder'.*leave one"),
        ({"label_column_name": "digit"}, "label_column_name='digit' is not a column of the train data.*image, label"),
        ({"image_column_name": "label"}, "image_column_name='label' holds ClassLabel.*expected images"),
    ],
)
def test_wrong_values_are_named(changes, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run_here(settings(tmp_path / "out", **changes), tmp_path, monkeypatch)


def test_folders_that_do_not_fit_are_explained(photos, tmp_path, monkeypatch):
    def run(**changes):
        run_here(from_folders(photos, tmp_path / "out", **{"do_predict": False, **changes}), tmp_path, monkeypatch)

    with pytest.raises(ValueError, match="model_name_or_path=None; name a checkpoint.*--config_overrides"):
        run(config_overrides=None)
    with pytest.raises(ValueError, match="label_column_name='label' is not a column.*every class needs a subfolder"):
        run(train_dir=str(photos / "test_flat"))
    with pytest.raises(ValueError, match="do_predict=True needs data to predict: --test_dir"):
        run(do_predict=True)
    (tmp_path / "empty" / "red").mkdir(parents=True)
    with pytest.raises(ValueError, match="validation_dir='.*empty' holds no image files; expected one subfolder"):
        run(validation_dir=str(tmp_path / "empty"))
    shutil.copytree(photos / "train" / "red", tmp_path / "one" / "red")
    with pytest.raises(ValueError, match=r"one class only, \['red'\]"):
        run(train_dir=str(tmp_path / "one"))
    shutil.copytree(photos / "train" / "red", tmp_path / "green" / "green")
    with pytest.raises(ValueError, match=r"\['green'\] do not occur in the training data"):
        run(validation_dir=str(tmp_path / "green"))


# --- accelerate configs ---


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_config_trains_the_vit(config, tmp_path):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"examples/configs/{config}.yaml"]
    command += ["--main_process_port", "0"]
    # The Trainer takes bf16 under DeepSpeed only with --bf16, and that only with a device that is no CPU.
    fsdp = config in ("fsdp2", "hsdp")
    command += ["--fsdp_transformer_layer_cls_to_wrap", "ViTLayer"] if fsdp else ["--mixed_precision", "no"]
    arguments = settings(tmp_path / "out", max_steps=3, use_cpu=None, max_eval_samples=32)
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    command += ["examples/classification/run_image_classification.py", str(tmp_path / "arguments.json")]
    paths = [str(ROOT / "tests" / "distributed" / "cpu_shim"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    logs = history(tmp_path / "out")
    assert len(logs) == 3
    for entry in logs:
        assert entry["swd/weight_decay"] == pytest.approx(5e-4 / entry["swd/grad_rms"], rel=1e-5)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["classifier.weight"].shape == (10, 32)
