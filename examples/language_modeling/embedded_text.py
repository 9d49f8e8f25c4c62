"""Texts without a download, and a tokenizer trained on a text.

`python`: the source files of Python's standard library; `manual`: the chapters of Python's manual that its `help()`
shows, English prose with examples. Nothing of them is stored in this repository: they are read where Python is
installed. Training and validation share no file or chapter. The same version of Python gives the same text in the
same order.

    python examples/language_modeling/embedded_text.py        # sizes, tokens, the beginning of a validation text
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from installed_sources import source_files, source_folder, stable_hash


if TYPE_CHECKING:
    from datasets import DatasetDict


# Tables of characters, and prose in string literals.
SKIPPED_PARTS = ("encodings/", "pydoc_data/")
# Written when Python was built, so that it differs from machine to machine.
SKIPPED_NAMES = ("_sysconfigdata", "_sysconfig_vars")
VALIDATION_SHARE = 0.1
END_OF_TEXT = "<|endoftext|>"
# The bytes and END_OF_TEXT.
MIN_VOCAB_SIZE = 257


def build_embedded_text(name: str = "python") -> DatasetDict:
    """One of `TEXTS`.

    Returns:
        `DatasetDict` with splits `train` and `validation` (a tenth of the texts, chosen by a hash of their names) and
        columns `text` (a whole file, or chapter) and `source` (its name).

    Raises:
        RuntimeError: this Python comes without the text.
    """
    from datasets import Dataset, DatasetDict

    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    embedded = TEXTS[name]
    for source, text in embedded.texts():
        held_out = int.from_bytes(stable_hash(source)[:4], "big") < VALIDATION_SHARE * 2**32
        if text:
            rows["validation" if held_out else "train"].append({"text": text, "source": source})
    num_characters = sum(len(row["text"]) for row in rows["train"])
    if num_characters < embedded.min_characters or not rows["validation"]:
        raise RuntimeError(
            f"embedded text {name!r}: {num_characters} characters of {embedded.description} in "
            f"{source_folder('python')}; expected {embedded.min_characters} or more. This Python comes without them: "
            "name a text by --train_file."
        )
    return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})


def _source_texts() -> Iterator[tuple[str, str]]:
    folder = source_folder("python")
    for name, path in source_files(folder) if folder else ():
        if name.startswith(SKIPPED_PARTS) or path.name.startswith(SKIPPED_NAMES):
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except (OSError, ValueError):  # unreadable, or in another encoding
            continue


def _manual_texts() -> Iterator[tuple[str, str]]:
    try:
        chapters: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    once = {text: name for name, text in sorted(chapters.items())}  # some chapters have two names
    yield from sorted(((name, text) for text, name in once.items()), key=lambda item: stable_hash(item[0]))


@dataclass(frozen=True)
class EmbeddedText:
    description: str
    texts: Callable[[], Iterable[tuple[str, str]]]  # names and texts, in an order that is the same everywhere
    min_characters: int  # of the training texts, if all of them are there


TEXTS = {
    "python": EmbeddedText("source files of Python's standard library", _source_texts, 1_000_000),
    "manual": EmbeddedText("chapters of Python's manual", _manual_texts, 200_000),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; every text that it encodes begins with `END_OF_TEXT`, as with the tokenizers of Llama.

    Args:
        texts (`Iterable[str]`): what it learns from.
        vocab_size (`int`): tokens, 257 or more. With 257 every byte is a token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"{vocab_size=}; expected {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}) or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def main() -> None:
    for name in TEXTS:
        data = build_embedded_text(name)
        tokenizer = train_tokenizer(data["train"]["text"], vocab_size=2048)
        for split, part in data.items():
            num_characters = sum(map(len, part["text"]))
            num_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(part["text"]))
            print(f"{name}, {split}: {len(part)} texts, {num_characters:,} characters, {num_tokens:,} tokens of 2,048")
        first = data["validation"][0]
        print(f"{first['source']}: {first['text'][:300]!r}")


if __name__ == "__main__":
    main()
