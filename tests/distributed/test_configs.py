"""examples/configs: each Accelerate YAML is launched as it is, with the bare-loop example, on CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import text_task


ROOT = Path(__file__).resolve().parents[2]
for name in ("accelerate", "datasets", "evaluate", "sklearn"):
    pytest.importorskip(name, reason="needs the extra: examples")


tiny_bert, tables = text_task.tiny_bert, text_task.tables

# What the example must say of itself: accelerate may quietly build another engine than was asked for.
ENGINES = {
    "ddp": "MULTI_GPU, 2 processes, DistributedDataParallel, AdamS",
    "fsdp2": "FSDP, 2 processes, FSDPBertForSequenceClassification, FSDP version 2, mesh (2,), AdamS",
    "hsdp": "FSDP, 4 processes, FSDPBertForSequenceClassification, FSDP version 2, mesh (2, 2), AdamS",
    "zero1": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 1, AdamS",
    "zero2": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 2, AdamS",
    "zero3": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 3, AdamS",
    "zero3_offload": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 3, DeepSpeedCPUAdam",
}
DEFAULT = ("ddp", "fsdp2", "zero2", "zero3")


def test_every_config_is_run_by_a_test():
    configs = {file.stem for file in (ROOT / "examples" / "configs").glob("*.yaml")}
    assert configs == {*ENGINES, "multi_node"}  # multi_node: see test_multi_node.py


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[] if c in DEFAULT else [pytest.mark.slow]) for c in ENGINES]
)
def test_config_trains_under_its_engine(config, tiny_bert, tables, tmp_path):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"examples/configs/{config}.yaml"]
    command += ["--main_process_port", "0", "examples/classification/run_glue_no_trainer.py"]
    settings = {
        "model_name_or_path": tiny_bert,
        "train_file": tables["train"],
        "validation_file": tables["validation"],
        "max_train_steps": 3,
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "output_dir": tmp_path / "out",
    }
    command += [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    paths = [str(Path(__file__).parent / "cpu_shim"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert f"Engine = {ENGINES[config]}, mixed precision bf16" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["engine"].startswith(ENGINES[config])
    assert results["swd/weight_decay"] == pytest.approx(0.01 / results["swd/grad_rms"], rel=1e-6)
    assert 0.5 < results["train_loss"] < 0.9
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4 * 1000
