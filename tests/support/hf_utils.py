"""A BERT small enough to train in a second, data it can learn, and TrainingArguments for CPU runs."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def sentences(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 tokens, labelled by the parity of the first."""
    tokens = torch.randint(100, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in tokens]


def arguments(output_dir, cls: type[TrainingArguments] = TrainingArguments, **changes) -> TrainingArguments:
    settings = {
        "optim": "adams",
        "weight_decay": 0.01,
        "optim_args": "reference_steps=3",
        "learning_rate": 1e-3,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return cls(output_dir=str(output_dir), **{**settings, **changes})


def train(output_dir, trainer_class=Trainer, *, model=None, resume=None, trainer_kwargs=None, **changes):
    """A Trainer that has trained `tiny_bert()`, or `model`, with [`arguments`]."""
    args = arguments(output_dir, **changes)
    trainer = trainer_class(model or tiny_bert(), args, train_dataset=sentences(), **(trainer_kwargs or {}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(actual, expected):
    """Difference of the models that two Trainers made of `tiny_bert()`, in units of the distance that the second has
    travelled."""
    end = flat(expected.model)
    return (flat(actual.model) - end).norm() / (end - flat(tiny_bert())).norm()
