"""What a type checker tells a user of the package, and that keywords written twice agree."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import ForwardRef

import pytest

import hf_swd
from hf_swd.param_groups import AdamSOptions


# `# error: code` marks the lines in which mypy must find something; in all others it must not.
USER = """
import torch
from torch import nn
from transformers import TrainingArguments

from hf_swd import AdamS, ScheduledWeightDecay, SWDCallback, SWDTrainer, attach, create_adams, register

model = nn.Linear(2, 2)
params = model.parameters()
optimizer: torch.optim.Optimizer = AdamS(params, 1e-3, (0.9, 0.99), weight_decay=0.01, reference_steps=100, fused=None)
AdamS([{"params": [model.weight], "weight_decay": 0.0}], lr=torch.tensor(0.1))
adams: AdamS = create_adams(model, lr=2e-5, reference_steps=100, unclipped_norm=True, max_grad_norm=1.0)
adams.step()
adams.step(lambda: torch.ones(()))
norm: torch.Tensor = adams.clip_grad_norm_(1.0)
last_norm: float = adams.grad_norm
adams.schedule.refresh()
rms: float = adams.grad_rms
count: int = attach(adams, model).step_count
schedule = ScheduledWeightDecay(torch.optim.AdamW(params), beta2=0.99, reference_steps=100, max_grad_norm=1.0)
schedule.load_state_dict(schedule.state_dict())
SWDTrainer(model, TrainingArguments("out", optim="adams"), callbacks=[SWDCallback()])
register()

create_adams(model, reference_step=3)  # error: call-arg
create_adams(model, eps="small")  # error: arg-type
create_adams(params)  # error: arg-type
AdamS(params, weight_decay="x")  # error: arg-type
AdamS(params, reference_steps=0.5)  # error: arg-type
AdamS(params, reference_step=3)  # error: call-arg
ScheduledWeightDecay(adams, beta=0.9)  # error: call-arg
adams.clip_grad_norm_(1.0, defer=True)  # error: call-arg
adams.grad_rms = 1.0  # error: misc
adams.clip_grad_norm(1.0)  # error: attr-defined
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_mypy_finds_the_errors_of_a_user_and_no_others(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(USER)
    # mypy looks for packages in its folder, not through the import hook of an editable install; and it keeps its cache
    # there, which a run over the package itself has filled.
    folder = Path(hf_swd.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)],
        cwd=tmp_path if folder.name == "site-packages" else folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    # Errors in the package itself are not the user's.
    found = re.findall(r"user\.py:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.M)
    lines = enumerate(USER.splitlines(), 1)
    marked = [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error: " in line]
    assert found == marked, result.stdout + result.stderr


def test_options_of_create_adams_are_those_of_adams():
    parameters = inspect.signature(hf_swd.AdamS).parameters
    own = {"params", *inspect.signature(hf_swd.create_adams).parameters}
    expected = {name: parameter.annotation for name, parameter in parameters.items() if name not in own}
    hints = AdamSOptions.__annotations__
    assert {n: h.__forward_arg__ if isinstance(h, ForwardRef) else h for n, h in hints.items()} == expected
