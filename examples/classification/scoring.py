"""Classes and their metrics: what the examples of text and of images share, with the Trainer and without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
from transformers import EvalPrediction, PretrainedConfig


METRIC_MODULE = str(Path(__file__).resolve().parents[1] / "metrics" / "text_classification")


def label_numbers(labels: list[tuple[object, str]], config: PretrainedConfig) -> dict[object, int]:
    """Number of each label value; a checkpoint that knows the same class names in another order keeps its order."""
    known = {name.lower(): number for name, number in config.label2id.items()}
    if sorted(known) == sorted(name.lower() for _, name in labels):
        return {value: known[name.lower()] for value, name in labels}
    return {value: number for number, (value, _) in enumerate(labels)}


def number_classes(labels: list[tuple[object, str]], config: PretrainedConfig) -> dict[object, int]:
    """As `label_numbers`; writes the names into `config` as well."""
    numbers = label_numbers(labels, config)
    config.label2id = {name: numbers[value] for value, name in labels}
    config.id2label = {number: name for name, number in config.label2id.items()}
    return numbers


def make_compute_metrics(
    task_name: str | None = None, is_regression: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metrics of a GLUE task, or of any other classification or regression."""
    config_name = task_name or ("regression" if is_regression else "classification")
    metric = evaluate.load(METRIC_MODULE, config_name, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers = answers_of(prediction.predictions, is_regression)
        result = metric.compute(predictions=answers, references=prediction.label_ids)
        if task_name is not None and len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result

    return compute_metrics


def answers_of(predictions: np.ndarray | tuple, is_regression: bool = False) -> np.ndarray:
    """The number of the likeliest class, or the predicted value, of every sample."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(logits, axis=1) if is_regression else np.argmax(logits, axis=1)


def majority_baseline(train_labels: list[int], validation_labels: list[int]) -> float:
    """Validation accuracy, in [0, 1], of always answering the most frequent training label."""
    return Counter(validation_labels)[Counter(train_labels).most_common(1)[0][0]] / len(validation_labels)
