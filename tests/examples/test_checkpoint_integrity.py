"""examples/shared: training goes on from the newest checkpoint that was written to its end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_utils import arguments, sentences, tiny_bert
from safetensors.torch import save_file
from transformers import Trainer


pytest.importorskip("datasets", reason="needs the extra: examples")
from checkpoint_integrity import find_fault  # noqa: E402
from trainer_setup import find_checkpoint  # noqa: E402


ROOT = Path(__file__).parents[2]


def train(folder: Path, **changes) -> Trainer:
    settings = {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True, **changes}
    return Trainer(tiny_bert(), arguments(folder, **settings), train_dataset=sentences())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Output folder of a Trainer: checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    train(folder).train()
    return folder


@pytest.fixture
def output_dir(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "out")


def cut_off(file: Path, size: int | None = None) -> None:
    """Leave the first half of a file, or `size` bytes."""
    os.truncate(file, file.stat().st_size // 2 if size is None else size)


def test_whole_checkpoints_have_no_fault_and_the_last_is_taken(output_dir):
    assert [find_fault(output_dir / f"checkpoint-{step}") for step in (2, 4, 6)] == [None] * 3
    assert find_checkpoint(arguments(output_dir), overwrite=False) == str(output_dir / "checkpoint-6")


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
)
@pytest.mark.parametrize("size", [0, None], ids=["empty", "half"])
def test_checkpoint_with_a_file_cut_off_is_skipped_with_a_warning(output_dir, caplog, name, size):
    cut_off(output_dir / "checkpoint-6" / name, size)
    with caplog.at_level(logging.WARNING, logger="trainer_setup"):
        assert find_checkpoint(arguments(output_dir), overwrite=False) == str(output_dir / "checkpoint-4")
    assert f"Not going on from {output_dir / 'checkpoint-6'}, which is incomplete: {name}" in caplog.text
    assert (output_dir / "checkpoint-6" / name).exists()  # nothing is deleted


def test_training_stopped_while_it_saved_goes_on_from_the_checkpoint_before(output_dir, caplog):
    """What a Trainer writes until it dies in the middle of the checkpoint of step 6, and then the same command."""
    whole = train(output_dir)
    shutil.rmtree(output_dir / "checkpoint-6")

    def die(*args):
        raise KeyboardInterrupt

    whole._save_rng_state = die
    with pytest.raises(KeyboardInterrupt):
        whole.train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    assert (output_dir / "checkpoint-6" / "optimizer.pt").exists()
    # transformers' own choice stops, for want of trainer_state.json
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6.*trainer_state\.json"):
        train(output_dir).train(resume_from_checkpoint=True)

    for asked in (None, "last", "true"):
        checkpoint = find_checkpoint(arguments(output_dir, resume_from_checkpoint=asked), overwrite=False)
        assert checkpoint == str(output_dir / "checkpoint-4")
    assert "it has no trainer_state.json" in caplog.text
    train(output_dir).train(resume_from_checkpoint=checkpoint)
    assert find_checkpoint(arguments(output_dir), overwrite=False) == str(output_dir / "checkpoint-6")


def test_all_checkpoints_incomplete_is_an_error_not_a_new_start(output_dir):
    for step in (2, 4, 6):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint.*--overwrite_output_dir"):
        find_checkpoint(arguments(output_dir), overwrite=False)
    assert find_checkpoint(arguments(output_dir), overwrite=True) is None


def test_shards_of_weights_and_of_distributed_checkpoints_are_looked_at(output_dir):
    checkpoint = output_dir / "checkpoint-6"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(9)}, checkpoint / "model-1.safetensors")
    assert "model-2.safetensors" in find_fault(checkpoint)
    save_file({"b": torch.ones(9)}, checkpoint / "model-2.safetensors")
    assert find_fault(checkpoint) is None

    dcp.save({"a": torch.ones(999)}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    assert find_fault(checkpoint) is None
    (shard,) = (checkpoint / "pytorch_model_fsdp_0").glob("*.distcp")
    cut_off(shard)
    assert f"{shard.name} has" in find_fault(checkpoint)
    cut_off(checkpoint / "pytorch_model_fsdp_0" / ".metadata", 0)
    assert ".metadata is damaged" in find_fault(checkpoint)


PROCESS = """
import os, sys
from pathlib import Path
from transformers import TrainingArguments
import trainer_setup

for case in map(Path, sys.argv[1:]):
    arguments = TrainingArguments(output_dir=str(case / os.environ["RANK"]), use_cpu=True)
    assert arguments.world_size == 2
    try:
        found = trainer_setup.find_checkpoint(arguments, overwrite=False)
    except ValueError as error:
        found = str(error)
    (case / f"found.{os.environ['RANK']}").write_text(found)
"""


def test_all_processes_do_what_the_main_one_finds(run, tmp_path):
    """The second process has a folder of its own with a later checkpoint, as if it had come later."""
    cases = tmp_path / "complete", tmp_path / "incomplete"
    for case in cases:
        shutil.copytree(run / "checkpoint-4", case / "0" / "checkpoint-4")
        shutil.copytree(run / "checkpoint-6", case / "1" / "checkpoint-6")
    (cases[1] / "0" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "process.py").write_text(PROCESS)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(tmp_path / "process.py"), *map(str, cases)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples" / "shared")])},
        check=True,
        timeout=300,
    )
    found = [[(case / f"found.{rank}").read_text() for rank in range(2)] for case in cases]
    assert found[0] == [str(cases[0] / "0" / "checkpoint-4")] * 2
    assert all("holds no complete checkpoint" in text for text in found[1]), found
