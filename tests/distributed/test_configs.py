"""examples/configs: each file is launched as it is, with the examples, on CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clm_task
import pytest
import text_task
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[2]
for name in ("accelerate", "datasets", "evaluate", "sklearn"):
    pytest.importorskip(name, reason="needs the extra: examples")


tiny_bert, tables = text_task.tiny_bert, text_task.tables
tiny_llama, text_file = clm_task.tiny_llama, clm_task.text_file

# What the example must say of itself: accelerate may quietly build another engine than was asked for.
ENGINES = {
    "ddp": "MULTI_GPU, 2 processes, DistributedDataParallel, AdamS",
    "fsdp2": "FSDP, 2 processes, FSDP{model}, FSDP version 2, mesh (2,), AdamS",
    "hsdp": "FSDP, 4 processes, FSDP{model}, FSDP version 2, mesh (2, 2), AdamS",
    "zero1": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 1, AdamS",
    "zero2": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 2, AdamS",
    "zero3": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 3, AdamS",
    "zero3_offload": "DEEPSPEED, 2 processes, DeepSpeedEngine, ZeRO stage 3, DeepSpeedCPUAdam",
}
# For `--deepspeed` of a Trainer.
JSON_ENGINES = {f"deepspeed_{name}": ENGINES[name] for name in ("zero2", "zero3", "zero3_offload")}
DEFAULT = ("ddp", "fsdp2", "zero2", "zero3")


def test_every_config_is_run_by_a_test():
    configs = {file.stem for file in (ROOT / "examples" / "configs").iterdir()}
    assert configs == {*ENGINES, *JSON_ENGINES, "multi_node"}  # multi_node: see test_multi_node.py


def launch(config: str, script: str, settings: dict, folder: Path) -> str:
    """What the example said, launched with the config on processes of the CPU."""
    if "zero" in config:
        pytest.importorskip("deepspeed")
    if config in JSON_ENGINES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        settings = {**settings, "deepspeed": f"examples/configs/{config}.json"}
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [f"examples/configs/{config}.yaml", "--main_process_port", "0"]
    command += [
        f"examples/{script}.py",
        *(str(part) for item in settings.items() for part in (f"--{item[0]}", item[1])),
    ]
    paths = [str(Path(__file__).parent / "cpu_shim"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[] if c in DEFAULT else [pytest.mark.slow]) for c in ENGINES]
)
def test_config_trains_under_its_engine(config, tiny_bert, tables, tmp_path):
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
    output = launch(config, "classification/run_glue_no_trainer", settings, tmp_path)
    engine = ENGINES[config].format(model="BertForSequenceClassification")
    assert f"Engine = {engine}, mixed precision bf16" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["engine"].startswith(engine)
    assert results["swd/weight_decay"] == pytest.approx(0.01 / results["swd/grad_rms"], rel=1e-6)
    assert 0.5 < results["train_loss"] < 0.9
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4 * 1000


LORA = {"lora_r": 4, "lora_target_modules": "all-linear"}
BASES = {"base=lion_8bit": "Lion", "base=adamw_torch_8bit": "AdamW8bit", "base=adamw_torch": "AdamW"}


def language_model(config: str, slow: bool = True, lora: bool = False, resumed: bool = False, base: str = ""):
    id = config + "-lora" * lora + base.replace("base=", "-") + "-resumed" * resumed
    changes = LORA if lora else {"optim_args": base} if base else {}
    return pytest.param(config, changes, resumed, id=id, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("config", "changes", "resumed"),
    [
        *(language_model(config, slow=config not in ("fsdp2", "zero3")) for config in ENGINES),
        *(language_model(config) for config in JSON_ENGINES),
        *(language_model(config, resumed=True) for config in ("fsdp2", "zero2", "zero3")),
        *(language_model(config, lora=True, resumed=True) for config in ("ddp", "fsdp2", "zero2", "zero3")),
        language_model("ddp", base="base=lion_8bit", resumed=True),
        language_model("ddp", base="base=adamw_torch_8bit", resumed=True),
        *(language_model(config, base="base=adamw_torch", resumed=True) for config in ("fsdp2", "zero2", "zero3")),
    ],
)
def test_config_trains_the_language_model(config, changes, resumed, tiny_llama, text_file, tmp_path, monkeypatch):
    """The log is that of one process, and a run that is interrupted and called again ends with the same weights."""
    engine = {**ENGINES, **JSON_ENGINES}[config]
    settings = clm_task.settings(tiny_llama, text_file, tmp_path / "out", **changes)
    lora = "lora_r" in changes
    settings["per_device_train_batch_size"] //= int(engine.split()[1])
    if "zero" in config:
        settings["bf16"] = True  # a Trainer has DeepSpeed do what its own arguments say
    output = launch(config, "language_modeling/run_clm", settings, tmp_path)
    engine = engine.format(model="PeftModelForCausalLM" if lora else "LlamaForCausalLM")
    engine = engine.replace("AdamS", BASES.get(changes.get("optim_args"), "AdamS"))
    assert f"Engine = {engine}, mixed precision bf16" in output
    logs = clm_task.history(tmp_path / "out")
    reference = clm_task.run_here(clm_task.settings(tiny_llama, text_file, tmp_path / "one", **changes), monkeypatch)
    assert len(logs) == len(reference) == 4
    for entry, expected in zip(logs, reference, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=0.01)
        assert entry["swd/weight_decay"] == pytest.approx(expected["swd/weight_decay"], rel=0.05)
        assert entry["swd/weight_decay"] == pytest.approx(0.01 / entry["swd/grad_rms"], rel=1e-6)
    saved = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = load_file(tmp_path / "out" / saved)
    expected = load_file(tmp_path / "one" / saved)
    if "lm_head.weight" in weights:  # some engines save the tied head, too
        assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert {key: weight.shape for key, weight in weights.items()} == {k: w.shape for k, w in expected.items()}
    assert (tmp_path / "out" / "model.safetensors").exists() != bool(lora)

    if resumed:
        again = tmp_path / "again"
        again.mkdir()
        (tmp_path / "out" / "checkpoint-2").rename(again / "checkpoint-2")
        state = json.loads((again / "checkpoint-2" / "trainer_state.json").read_text())
        state["log_history"][0]["loss"] = 123.0  # a training that begins anew would not have it
        (again / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
        output = launch(config, "language_modeling/run_clm", {**settings, "output_dir": again}, tmp_path)
        assert f"Going on from {again / 'checkpoint-2'}" in output
        resumed_weights = load_file(again / saved)
        for key, weight in weights.items():
            torch.testing.assert_close(resumed_weights[key], weight, rtol=1e-6, atol=1e-7, msg=key)
        assert clm_task.history(again)[0]["loss"] == 123
        assert clm_task.history(again)[-1]["swd/weight_decay"] == pytest.approx(logs[-1]["swd/weight_decay"], rel=1e-6)
