"""`evaluate` metric module for text classification: of the nine GLUE tasks and of any other task, without the Hub.

evaluate.load("examples/metrics/text_classification", "mrpc").compute(predictions=[0, 1], references=[0, 1])
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""
_DESCRIPTION = """\
cola: Matthews correlation; stsb: Pearson and Spearman correlation; mrpc, qqp: accuracy and F1 of class 1; mnli, qnli,
rte, sst2, wnli: accuracy; classification: accuracy and macro-averaged F1; regression: mean squared error, Pearson and
Spearman correlation.
"""
_INPUTS_DESCRIPTION = """\
Args:
    predictions: class numbers, or for stsb and regression the predicted numbers.
    references: the true ones.
Returns:
    A dict of floats, by name of the metric.
"""
ACCURACY_ONLY = ("mnli", "qnli", "rte", "sst2", "wnli")
REGRESSION = ("stsb", "regression")
CONFIGS = ("cola", "mrpc", "qqp", "classification", *ACCURACY_ONLY, *REGRESSION)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class TextClassification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGS:
            raise ValueError(f"config_name={self.config_name!r}; expected one of {', '.join(CONFIGS)}.")
        value = datasets.Value("float32" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        name = self.config_name
        result: dict[str, float] = {}
        if name in REGRESSION:
            if name == "regression":
                result["mse"] = mean_squared_error(references, predictions)
            result["pearson"] = pearsonr(references, predictions).statistic
            result["spearmanr"] = spearmanr(references, predictions).statistic
        elif name == "cola":
            result["matthews_correlation"] = matthews_corrcoef(references, predictions)
        else:
            result["accuracy"] = accuracy_score(references, predictions)
            if name in ("mrpc", "qqp"):
                result["f1"] = f1_score(references, predictions)
            elif name == "classification":
                result["f1"] = f1_score(references, predictions, average="macro")
        return {key: float(value) for key, value in result.items()}
