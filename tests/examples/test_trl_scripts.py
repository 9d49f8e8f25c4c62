"""TRL's scripts `sft` and `dpo`, untouched, through the launcher, with the model that run_clm.py has trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clm_task
import pytest
import torch
from safetensors.torch import load_file


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
pytest.importorskip("datasets", reason="needs the extra: examples")
pytest.importorskip("trl")

text_file, tiny_llama = clm_task.text_file, clm_task.tiny_llama

PROMPTS = [f"for number in range({n}):\n\t" for n in range(24)]
ROWS = {
    "sft": [{"prompt": prompt, "completion": "print(number)\n"} for prompt in PROMPTS],
    "dpo": [{"prompt": prompt, "chosen": "print(number)\n", "rejected": "0 1 2 3"} for prompt in PROMPTS],
}


@pytest.fixture(scope="module")
def trained_llama(tiny_llama, text_file, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("clm") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        clm_task.run_here(clm_task.settings(tiny_llama, text_file, output_dir), monkeypatch)
    return output_dir


@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_script_of_trl_trains_with_adams(script, lora, trained_llama, tmp_path):
    peft = pytest.importorskip("peft") if lora else None
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[script]))
    settings = {
        "model_name_or_path": trained_llama,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "optim": "adams",
        "optim_args": "reference_steps=2",
        "learning_rate": 5e-3 if lora else 1e-2,
        "weight_decay": 0.01,
        "max_steps": 5,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_train_batch_size": 8,
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **({"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}),
    }
    command = [sys.executable, "-m", "hf_swd", "run", "-m", f"trl.scripts.{script}"]
    command += [str(part) for item in settings.items() for part in (f"--{item[0]}", item[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]

    log = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in log if "loss" in entry]
    assert len(logs) == 5
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert [entry["swd/weight_decay"] for entry in logs[:2]] == [0.01, 0.01]
    for entry in logs[2:]:
        decay = 0.01 * logs[1]["swd/grad_rms"] / entry["swd/grad_rms"]
        assert entry["swd/weight_decay"] == pytest.approx(decay, rel=1e-5)
    (evaluation,) = (entry for entry in log if "eval_loss" in entry)
    assert evaluation["eval_loss"] < logs[0]["loss"]

    before = load_file(trained_llama / "model.safetensors")
    if lora:
        assert not (tmp_path / "out" / "model.safetensors").exists()
        adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert len(adapter) == 2 * 7 * 2  # A and B of seven modules in two layers
        assert all(weight.isfinite().all() and weight.any() for weight in adapter.values())  # B begins with zeros
        base = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).unload()
        assert all(torch.equal(base.state_dict()[name], weight) for name, weight in before.items())
    else:
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert after.keys() == before.keys()
        for name, weight in after.items():
            assert weight.isfinite().all() and not torch.equal(weight, before[name]), name
