"""The text of run_clm.py: where it comes from, and the blocks of tokens that a model is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from embedded_text import TEXTS, build_embedded_text
from transformers import PreTrainedTokenizerBase


# Suffix of a file -> how `datasets` calls its format.
FORMATS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class TextSource:
    """What to train and evaluate on: exactly one of `dataset_name`, `train_file`, `embedded`."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set: a name on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training text: .txt, or .csv, .json or .jsonl with one text per row."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, likewise."})
    embedded: bool = field(
        default=False, metadata={"help": "A text that comes with Python (see embedded_text); no download."}
    )
    embedded_text: str | None = field(
        default=None,
        metadata={
            "help": "Which text --embedded is: the source files of Python's standard library (default), or chapters "
            "of its manual.",
            "choices": list(TEXTS),
        },
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the texts; by default `text`, or else the first."}
    )
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Last part of the training text that is for validation if nothing else is."}
    )
    max_train_characters: int | None = field(
        default=None, metadata={"help": "Train, the tokenizer too, on so many characters from the beginning."}
    )

    def __post_init__(self) -> None:
        files = {name: getattr(self, name) for name in ("train_file", "validation_file")}
        sources = [self.dataset_name is not None, any(file is not None for file in files.values()), self.embedded]
        if sum(sources) != 1 or (sources[1] and self.train_file is None):
            raise ValueError(
                f"dataset_name={self.dataset_name!r}, train_file={self.train_file!r}, "
                f"validation_file={self.validation_file!r}, embedded={self.embedded}; expected exactly one source: "
                "--dataset_name, --train_file (with or without --validation_file), or --embedded."
            )
        if self.embedded_text is not None and not self.embedded:
            raise ValueError(
                f"embedded_text={self.embedded_text!r} without --embedded would be ignored; leave one of the two out."
            )
        self.embedded_text = self.embedded_text or "python"
        if self.embedded_text not in TEXTS:  # from a file of arguments, whose choices nobody has checked
            raise ValueError(f"embedded_text={self.embedded_text!r}; expected one of {', '.join(TEXTS)}.")
        for name, file in files.items():
            if file is not None and Path(file).suffix not in FORMATS:
                raise ValueError(f"{name}={file!r}; expected a file that ends in {', '.join(FORMATS)}.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage}; expected a number between 0 and 100."
            )
        if self.max_train_characters is not None and self.max_train_characters < 1:
            raise ValueError(f"max_train_characters={self.max_train_characters}; expected at least 1, or nothing.")

    def rows_are_lines(self, split: str) -> bool:
        """Of one text, not texts of their own."""
        file = (self.validation_file if split == "validation" else None) or self.train_file
        return file is not None and Path(file).suffix == ".txt"


# --- text ---


def load_text(source: TextSource, cache_dir: str | None = None, token: str | None = None) -> datasets.DatasetDict:
    """Splits train and validation, with the one column `text`."""
    if source.embedded:
        data = build_embedded_text(source.embedded_text)
    elif source.dataset_name is not None:
        data = datasets.load_dataset(source.dataset_name, source.dataset_config_name, cache_dir=cache_dir, token=token)
    else:
        files = {"train": source.train_file, "validation": source.validation_file}
        data = {
            split: _load_file(f"{split}_file", file, cache_dir) for split, file in files.items() if file is not None
        }
    if "train" not in data:
        raise ValueError(f"dataset_name={source.dataset_name!r} has no split `train`; it has {', '.join(data)}.")
    data = {
        split: _text_column(data[split], source.text_column_name) for split in ("train", "validation") if split in data
    }
    if "validation" not in data:
        data |= _split_off_validation(data["train"], source.validation_split_percentage)
    if source.max_train_characters is not None:
        data["train"] = first_characters(data["train"], source.max_train_characters)
    return datasets.DatasetDict(data)


def _load_file(argument: str, file: str, cache_dir: str | None) -> datasets.Dataset:
    if not Path(file).is_file():
        raise ValueError(f"{argument}={file!r}; there is no such file.")
    if Path(file).stat().st_size == 0:
        raise ValueError(f"{argument}={file!r} is empty.")
    kind = FORMATS[Path(file).suffix]
    options = {"keep_linebreaks": True} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=file, split="train", cache_dir=cache_dir, **options)


def _text_column(part: datasets.Dataset, name: str | None) -> datasets.Dataset:
    column = name or ("text" if "text" in part.column_names else part.column_names[0])
    if column not in part.column_names:
        raise ValueError(f"text_column_name={name!r} is not among the columns {', '.join(part.column_names)}.")
    if getattr(part.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"text_column_name={name!r}: the column {column!r} holds {part.features[column]}, not texts; the columns "
            f"are {', '.join(part.column_names)}."
        )
    part = part.select_columns(column)
    return part if column == "text" else part.rename_column(column, "text")


def _split_off_validation(train: datasets.Dataset, percentage: float) -> dict[str, datasets.Dataset]:
    num_train = round(len(train) * (1 - percentage / 100))
    if not 0 < num_train < len(train):
        raise ValueError(
            f"validation_split_percentage={percentage}: {len(train)} rows of text cannot be divided so; name a "
            "--validation_file or another percentage."
        )
    return {"train": train.select(range(num_train)), "validation": train.select(range(num_train, len(train)))}


def first_characters(part: datasets.Dataset, limit: int) -> datasets.Dataset:
    texts: list[str] = []
    for text in part["text"]:
        texts.append(text[:limit])
        limit -= len(texts[-1])
        if limit == 0:
            break
    return datasets.Dataset.from_dict({"text": texts}, features=part.features)


# --- tokens ---


def tokenize(
    part: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, rows_are_lines: bool, **options: object
) -> datasets.Dataset:
    """Column `input_ids`; a text begins and ends as the tokenizer has it, a line within a text does not."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # Not `verbose`: what is longer than the model takes is cut into blocks.
        encoded = tokenizer(rows["text"], add_special_tokens=not rows_are_lines, verbose=False)
        return {"input_ids": encoded["input_ids"]}

    return part.map(encode, batched=True, remove_columns=part.column_names, **options)


class TokenBlocks(torch.utils.data.Dataset):
    """
    The rows of tokens one after the other, cut into blocks of equal size; what is left at the end belongs to none.

    Args:
        rows (`Iterable[list[int]]`): the tokens.
        block_size (`int`): of a block, in tokens.
        max_blocks (`int`, *optional*): keep only the first blocks.
        name (`str`, *optional*, defaults to "text"): of the text, for the error.

    Raises:
        ValueError: the tokens do not fill one block.
    """

    def __init__(
        self, rows: Iterable[list[int]], block_size: int, max_blocks: int | None = None, name: str = "text"
    ) -> None:
        # 4 bytes for a token: all of them are in memory, once in every process.
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        num_blocks = len(tokens) // block_size
        if num_blocks == 0:
            raise ValueError(
                f"{name}: {len(tokens)} tokens do not fill one block of block_size={block_size}; take more text or a "
                "smaller --block_size."
            )
        self.blocks = torch.from_numpy(tokens[: num_blocks * block_size]).view(num_blocks, block_size)[:max_blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.blocks[index].long()
        return {"input_ids": tokens, "labels": tokens}
