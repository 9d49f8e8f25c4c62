"""Trains a ViT, or another image classifier of Transformers, with AdamS or any other optimizer of the Trainer.

Without a download (a small ViT from random weights, handwritten digits from scikit-learn; see embedded_images.py):

    pip install -e ".[examples]"
    python examples/classification/run_image_classification.py --embedded --do_train --do_eval --do_predict \\
        --output_dir outputs/digits --optim adams --weight_decay 5e-4 --learning_rate 1e-3 --max_grad_norm 0 \\
        --warmup_steps 100 --lr_scheduler_type cosine --per_device_train_batch_size 32 --num_train_epochs 40 \\
        --logging_steps 50 --report_to tensorboard

A data set from the Hub:

    python examples/classification/run_image_classification.py --dataset_name AI-Lab-Makerere/beans \\
        --image_column_name image --label_column_name labels --model_name_or_path google/vit-base-patch16-224-in21k \\
        --do_train --do_eval --do_predict --optim adams --optim_args reference_steps=100 --weight_decay 0.01 \\
        --learning_rate 3e-5 --max_grad_norm 0 --num_train_epochs 3 --output_dir outputs/beans

Folders (one subfolder of images for each class, or images and a metadata.csv):

    python examples/classification/run_image_classification.py --train_dir photos/train \\
        --validation_dir photos/validation --model_name_or_path google/vit-base-patch16-224-in21k --do_train \\
        --do_eval --optim adams --output_dir outputs/photos

All arguments from a file: `python examples/classification/run_image_classification.py arguments.yaml` (or .json).
Several processes: `accelerate launch examples/classification/run_image_classification.py ...`. Training goes on from
the last complete checkpoint in --output_dir if there is one.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from embedded_images import build_embedded_images
from PIL import Image
from scoring import answers_of, majority_baseline, make_compute_metrics, number_classes
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
)

import hf_swd  # makes --optim adams known to TrainingArguments


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from trainer_setup import HubArguments, OutputArguments, finish, parse_arguments, save_training, start


logger = logging.getLogger(__name__)

# 0.3 million parameters, for images of a few pixels.
SMALL_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
AUGMENTATIONS = ("photos", "digits", "none")
SUBSET_SEED = 0  # the same samples in every run, whatever its seed


@dataclass
class ModelArguments(HubArguments):
    """Which model to train: a checkpoint, or a ViT from random weights."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint: a folder or a name on the Hub. Without it, a ViT starts from random weights."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Settings of the ViT from random weights, such as hidden_size=128,num_hidden_layers=6; the others "
            "are " + ", ".join(f"{key}={value}" for key, value in SMALL_VIT.items()) + "."
        },
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not the model's own."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head of another size instead of stopping."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.config_overrides is not None:
            raise ValueError(
                f"config_overrides={self.config_overrides!r} with model_name_or_path={self.model_name_or_path!r}; "
                "a checkpoint has its own settings: leave one of the two out."
            )


@dataclass
class DataTrainingArguments(OutputArguments):
    """What to train and evaluate on: exactly one of `dataset_name`, `train_dir`, `embedded`."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set: a name on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images, one subfolder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Validation images, likewise."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Images for --do_predict, likewise, or all in one folder without classes."}
    )
    embedded: bool = field(default=False, metadata={"help": "Handwritten digits from scikit-learn; no download."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images that are for validation if nothing else is."}
    )
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "Random changes of training images. photos: cut-outs and mirroring; digits: small shifts and "
            "rotations; none. By default digits with --embedded, else photos."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples, drawn once."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many samples, drawn once."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first samples to predict."})

    def __post_init__(self) -> None:
        folders = {name: getattr(self, name) for name in ("train_dir", "validation_dir", "test_dir")}
        sources = [
            self.dataset_name is not None,
            any(folder is not None for folder in folders.values()),
            self.embedded,
        ]
        if sum(sources) != 1 or (sources[1] and self.train_dir is None):
            raise ValueError(
                f"dataset_name={self.dataset_name!r}, "
                f"{', '.join(f'{name}={folder!r}' for name, folder in folders.items())}, "
                f"embedded={self.embedded}; expected exactly one source: --dataset_name, --train_dir (with or without "
                "--validation_dir and --test_dir), or --embedded."
            )
        for name, folder in folders.items():
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{name}={folder!r}; expected a folder that exists.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split={self.train_val_split}; expected a number between 0 and 1.")
        if self.augmentation is None:
            self.augmentation = "digits" if self.embedded else "photos"
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation={self.augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1, or nothing for all samples.")


# --- data ---


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> datasets.DatasetDict:
    """Splits train, validation and perhaps test, with columns `image` (RGB) and `label` (in test not always)."""
    if data_args.embedded:
        data = build_embedded_images()
    elif data_args.dataset_name is not None:
        data = datasets.load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
        data = {
            split: load_folder(f"{split}_dir", folder, model_args.cache_dir)
            for split, folder in folders.items()
            if folder is not None
        }
    if "train" not in data:
        raise ValueError(f"dataset_name={data_args.dataset_name!r} has no split `train`; it has {', '.join(data)}.")
    data = {
        split: uniform_columns(data[split], split, data_args)
        for split in ("train", "validation", "test")
        if split in data
    }
    if "validation" not in data:
        parts = data["train"].train_test_split(data_args.train_val_split, seed=SUBSET_SEED)
        data |= {"train": parts["train"], "validation": parts["test"]}
    return datasets.DatasetDict(data)


def load_folder(argument: str, folder: str, cache_dir: str | None) -> datasets.Dataset:
    kinds = {*Image.registered_extensions(), ".zip"}
    if not any(path.suffix.lower() in kinds for path in Path(folder).rglob("*")):
        raise ValueError(
            f"{argument}={folder!r} holds no image files; expected one subfolder of images for each class."
        )
    # Without this, `datasets` takes no labels from a folder with one class, or with images at several depths.
    drop_labels = False if any(path.is_dir() for path in Path(folder).iterdir()) else None
    files = {"train": os.path.join(folder, "**")}
    return datasets.load_dataset(
        "imagefolder", data_files=files, drop_labels=drop_labels, split="train", cache_dir=cache_dir
    )


def uniform_columns(part: datasets.Dataset, split: str, data_args: DataTrainingArguments) -> datasets.Dataset:
    wanted = {"image_column_name": "image", "label_column_name": "label"}
    for argument in list(wanted):
        column = getattr(data_args, argument)
        if column not in part.column_names:
            if (argument, split) == ("label_column_name", "test"):
                del wanted[argument]
                continue
            raise ValueError(
                f"{argument}={column!r} is not a column of the {split} data; "
                f"its columns are {', '.join(part.column_names)}."
                + (" In a folder, every class needs a subfolder of its own." if data_args.train_dir else "")
            )
    part = part.select_columns([getattr(data_args, argument) for argument in wanted])
    part = part.rename_columns(
        {
            getattr(data_args, argument): name
            for argument, name in wanted.items()
            if getattr(data_args, argument) != name
        }
    )
    feature = part.features["image"]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"image_column_name={data_args.image_column_name!r} holds {feature}; expected images or paths."
        )
    return part.cast_column("image", datasets.Image(mode="RGB"))


def class_names(part: datasets.Dataset) -> list[str | None]:
    """The class of every sample; None where the data keep it to themselves (-1 in test splits of the Hub)."""
    feature, labels = part.features["label"], list(part["label"])
    if isinstance(feature, datasets.ClassLabel):
        return [None if label is None or label < 0 else feature.names[label] for label in labels]
    return [None if label is None else str(label) for label in labels]


def all_classes(train: datasets.Dataset, label_column_name: str) -> list[str]:
    """The classes in order, numbers as numbers."""
    feature = train.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif getattr(feature, "dtype", "").startswith(("int", "uint", "bool", "string", "large_string")):
        names = [str(label) for label in sorted(set(train["label"]) - {None})]
    else:
        raise ValueError(
            f"label_column_name={label_column_name!r} holds {feature}; expected classes: words or integers."
        )
    if len(names) < 2:
        raise ValueError(
            f"label_column_name={label_column_name!r}: the training data have one class only, {names}; "
            "expected two or more."
        )
    return names


# --- augmentation ---
# By Pillow, not torchvision: its wheel of the package index is built for the torch there, and does not import beside
# torch's build for CPU, which CI has ("operator torchvision::nms does not exist": 0.28.0 with torch 2.13.0+cpu).


def cut_out_and_mirror(image: Image.Image, height: int, width: int, rng: random.Random) -> Image.Image:
    """A random part of a photo, 8 to 100 % of its area and 3:4 to 4:3 in shape, mirrored half of the time."""
    area = image.width * image.height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    part_width = min(image.width, math.sqrt(area * ratio))
    part_height = min(image.height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, image.width - part_width), rng.uniform(0, image.height - part_height)
    box = (left, top, left + part_width, top + part_height)
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def shift_and_rotate(image: Image.Image, height: int, width: int, rng: random.Random) -> Image.Image:
    """A digit shifted by up to 1/10 of the image and rotated by up to 12 degrees; mirrored it would be no digit."""
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    shift = (rng.uniform(-0.1, 0.1) * width, rng.uniform(-0.1, 0.1) * height)
    return image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, translate=shift)


Augmentation = Callable[[Image.Image, int, int, random.Random], Image.Image]
AUGMENT: dict[str, Augmentation | None] = {"photos": cut_out_and_mirror, "digits": shift_and_rotate, "none": None}


def input_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """(height, width) of what the image processor makes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    return size["shortest_edge"], size["shortest_edge"]


class ImageDataset(torch.utils.data.Dataset):
    """
    Images as the model takes them, made when they are asked for.

    The augmentation of an image depends on the seed, the epoch and its place in the data set only. So a resumed run
    sees the images that the uninterrupted run saw, as does a run with another number of processes or of data loader
    workers.

    Args:
        data (`Dataset`): with columns `image` and, perhaps, `label`.
        processor (`BaseImageProcessor`): of the model.
        numbers (`dict[str, int]`): number of every class.
        augment (*optional*): one of `AUGMENT`.
        seed (`int`, *optional*, defaults to 0): of the augmentation.

    Raises:
        ValueError: a class is not among `numbers`.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        processor: BaseImageProcessor,
        numbers: dict[str, int],
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = data.select_columns("image")
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        names = class_names(data) if "label" in data.column_names else [None]
        # Predictions need no labels; with some missing there is nothing to score.
        self.labels = None if None in names else [numbers.get(name, -1) for name in names]
        if self.labels is not None and -1 in self.labels:
            raise ValueError(f"label: {sorted(set(names) - set(numbers))} do not occur in the training data.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        image, unchanged = self.images[index]["image"], {}
        if self.augment is not None:
            rng = random.Random(f"{self.seed} {int(self.epoch)} {index}")
            image = self.augment(image, *input_size(self.processor), rng)
            unchanged = {"do_resize": False, "do_center_crop": False}  # it has the model's size already
        sample = {"pixel_values": self.processor(image, return_tensors="pt", **unchanged)["pixel_values"][0]}
        return sample if self.labels is None else {**sample, "labels": self.labels[index]}


class EpochCallback(TrainerCallback):
    """Tells the training images which epoch it is."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch.fill_(int(state.epoch or 0))


# --- model ---


def small_vit_config(overrides: str | None) -> ViTConfig:
    config = ViTConfig(**SMALL_VIT)
    if overrides is not None:
        try:
            config.update_from_string(overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config_overrides={overrides!r}: {error}; expected settings of ViTConfig such as "
                "hidden_size=128,patch_size=2."
            ) from error
    if config.image_size % config.patch_size or config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config_overrides={overrides!r}: image_size={config.image_size} must be a multiple of "
            f"patch_size={config.patch_size}, and hidden_size={config.hidden_size} of "
            f"num_attention_heads={config.num_attention_heads}."
        )
    return config


def load_model(
    model_args: ModelArguments, classes: list[str]
) -> tuple[PreTrainedModel, BaseImageProcessor, dict[str, int]]:
    """Model, image processor, number of every class."""

    labels = [(name, name) for name in classes]
    name = model_args.model_name_or_path
    if name is None:
        config = small_vit_config(model_args.config_overrides)
        numbers = number_classes(labels, config)
        model = AutoModelForImageClassification.from_config(config)
    else:
        config = AutoConfig.from_pretrained(name, num_labels=len(classes), **model_args.hub)
        numbers = number_classes(labels, config)
        model = AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **model_args.hub
        )
    processor_name = model_args.image_processor_name or name
    if processor_name is None:
        half = [0.5] * config.num_channels
        size = {"height": config.image_size, "width": config.image_size}
        processor = ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    else:
        processor = AutoImageProcessor.from_pretrained(processor_name, **model_args.hub)
    return model, processor, numbers


@contextmanager
def checkpoints_that_can_be_resumed(model: PreTrainedModel) -> Iterator[None]:
    """Has checkpoints keep the names that the weights have in the model.

    `save_pretrained` writes the names that a model had when it was published, as for ViT, and `from_pretrained`
    translates them back. But the Trainer (transformers 5.23 and before) loads its checkpoints without translating: it
    would go on from random weights.
    """
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def main() -> None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataTrainingArguments, TrainingArguments))
    if model_args.model_name_or_path is None and model_args.config_overrides is None and not data_args.embedded:
        raise ValueError(
            "model_name_or_path=None; name a checkpoint, such as google/vit-base-patch16-224-in21k, or describe a ViT "
            "to train from random weights by --config_overrides."
        )
    checkpoint = start(training_args, data_args.overwrite_output_dir, logger)

    with training_args.main_process_first(desc="loading the data"):
        data = load_data(data_args, model_args)
    if training_args.do_predict and "test" not in data:
        raise ValueError(
            "do_predict=True needs data to predict: --test_dir, --embedded, or a data set with a split `test`."
        )
    classes = all_classes(data["train"], data_args.label_column_name)
    model, processor, numbers = load_model(model_args, classes)
    logger.info(f"{type(model).__name__} with {model.num_parameters():,} parameters, {len(classes)} classes")

    def drawn(split: str, limit: int | None) -> datasets.Dataset:
        part = data[split]  # folders come class by class, hence the shuffling
        return part if limit is None else part.shuffle(seed=SUBSET_SEED).select(range(min(limit, len(part))))

    train_dataset = ImageDataset(
        drawn("train", data_args.max_train_samples),
        processor,
        numbers,
        AUGMENT[data_args.augmentation],
        training_args.data_seed if training_args.data_seed is not None else training_args.seed,
    )
    eval_dataset = ImageDataset(drawn("validation", data_args.max_eval_samples), processor, numbers)
    for split, dataset in (("train", train_dataset), ("validation", eval_dataset)):
        if dataset.labels is None:
            raise ValueError(f"label_column_name={data_args.label_column_name!r}: some {split} samples have no label.")
    trainer = hf_swd.SWDTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=make_compute_metrics(),
        processing_class=processor,
        callbacks=[EpochCallback(train_dataset)],
    )

    if training_args.do_train:
        with checkpoints_that_can_be_resumed(model):
            result = trainer.train(resume_from_checkpoint=checkpoint)
        save_training(trainer, result, len(train_dataset))

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_dataset)
        metrics["eval_majority_baseline"] = majority_baseline(train_dataset.labels, eval_dataset.labels)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        test = data["test"]
        if data_args.max_predict_samples is not None:
            test = test.select(range(min(data_args.max_predict_samples, len(test))))
        test_dataset = ImageDataset(test, processor, numbers)
        prediction = trainer.predict(test_dataset, metric_key_prefix="predict")
        metrics = {**prediction.metrics, "predict_samples": len(test_dataset)}
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)
        if trainer.is_world_process_zero():
            answers = (model.config.id2label[number] for number in answers_of(prediction.predictions))
            lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(answers))]
            (Path(training_args.output_dir) / "predict_results.txt").write_text("\n".join(lines) + "\n")

    card = {"tasks": "image-classification", "tags": ["hf_swd", "vision"]}
    if model_args.model_name_or_path is not None:
        card["finetuned_from"] = model_args.model_name_or_path
    if data_args.embedded:
        card["dataset"] = "handwritten digits of scikit-learn"
    elif data_args.dataset_name is not None:
        card |= {"dataset": data_args.dataset_name, "dataset_tags": data_args.dataset_name}
    finish(trainer, card)


if __name__ == "__main__":
    main()
