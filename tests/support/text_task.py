"""A text task of a few words and a BERT for it: what the tests of the text examples train on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch


WORDS = ["good", "bad", "the", "film", "was", "really", "plot", "and"]


def write_table(path: Path, count: int, label) -> Path:
    generator = torch.Generator().manual_seed(count)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for _ in range(count):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=generator).tolist()]
            writer.writerow([" ".join(words), label(words)])
    return path


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder with a BERT of random weights and a tokenizer that knows WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tables")

    def tone(words):
        return "positive" if words.count("good") >= words.count("bad") else "negative"

    def share(words):
        return words.count("good") / len(words)

    return {
        "train": write_table(folder / "train.csv", 64, tone),
        "validation": write_table(folder / "validation.csv", 32, tone),
        "regression_train": write_table(folder / "regression_train.csv", 64, share),
        "regression_validation": write_table(folder / "regression_validation.csv", 32, share),
    }
