"""What the examples with the Trainer share: arguments, logging, the checkpoint to go on from, saving."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate.utils import broadcast_object_list
from checkpoint_integrity import last_complete
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

import hf_swd


logger = logging.getLogger(__name__)


@dataclass
class HubArguments:
    """What every checkpoint is loaded with."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloads from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(
        default=None, metadata={"help": "Access token of the Hub; by default the one stored by `hf auth login`."}
    )

    @property
    def hub(self) -> dict[str, str | None]:
        """Arguments of `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass
class OutputArguments:
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start from the beginning although --output_dir holds something."}
    )


def parse_arguments(kinds: tuple[type, ...]) -> tuple:
    """The dataclasses `kinds`, from the command line or from the one file that it names."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(yaml_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def start(training_args: TrainingArguments, overwrite: bool, script: logging.Logger) -> str | None:
    """
    Sets up logging, that of the script included, and the seed.

    Returns:
        `str`, *optional*: the checkpoint to go on training from.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    for each in (logger, script):
        each.setLevel(log_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    script.info(f"Training arguments: {training_args}")
    checkpoint = find_checkpoint(training_args, overwrite) if training_args.do_train else None
    set_seed(training_args.seed)
    return checkpoint


def find_checkpoint(training_args: TrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last complete one in the output folder, else None."""
    asked = training_args.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "last"):
        return asked
    folder = training_args.output_dir
    # One process looks for all: the others might find another one complete, or files that one of them writes by then.
    found = [_look_for_checkpoint(folder, asked or not overwrite) if training_args.process_index == 0 else None]
    last, is_empty = broadcast_object_list(found)[0]
    if last is not None:
        logger.warning(f"Going on from {last}; --overwrite_output_dir starts from the beginning.")
    elif asked is not None:
        raise ValueError(
            f"resume_from_checkpoint={asked!r}, but there is no complete checkpoint in output_dir={folder!r}."
        )
    elif not is_empty and not overwrite:
        raise ValueError(
            f"output_dir={folder!r} is not empty and holds no complete checkpoint; choose another one or add "
            "--overwrite_output_dir."
        )
    return last


def _look_for_checkpoint(folder: str, wanted: bool) -> tuple[str | None, bool]:
    """The last complete checkpoint, if it is wanted and there is one; and whether the folder is empty or missing."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return None, True
    if not wanted:
        return None, False
    last, faults = last_complete(Path(folder))
    for checkpoint, fault in faults.items():
        logger.warning(f"Not going on from {checkpoint}, which is incomplete: {fault}.")
    return last and str(last), False


def save_model(trainer: hf_swd.SWDTrainer) -> None:
    """Saves the whole model into --output_dir, under FSDP too, where checkpoints hold shards."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def save_training(trainer: hf_swd.SWDTrainer, result: TrainOutput, num_samples: int) -> None:
    """Saves the trained model, the metrics of the training, and the Trainer's state."""
    metrics = {**result.metrics, "train_samples": num_samples}
    save_model(trainer)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def finish(trainer: hf_swd.SWDTrainer, card: dict[str, Any]) -> None:
    """Writes the model card, to the Hub with the model under --push_to_hub; then the processes part."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.end_training()  # without it, a process may abort at its exit
