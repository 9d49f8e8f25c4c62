"""What `import hf_swd` needs, what it brings, and in which direction its modules import one another."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hf_swd


PACKAGE = Path(hf_swd.__file__).parent
PUBLIC = {"AdamS", "ScheduledWeightDecay", "attach", "create_adams", "SWDTrainer", "SWDCallback", "register"}
OPTIONAL = "deepspeed datasets evaluate matplotlib scipy sklearn pandas tensorboard trl peft".split()
# The design's module map from the bottom up. What stands beside these modules may be anywhere below those that use it.
MAP = "grad_norm schedule adams zero registration trainer plot launch".split()


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def block(names: list[str]) -> str:
    """Code that makes packages unimportable, also those that another package has found to be installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


STEP = """
import torch, hf_swd
p = torch.nn.Parameter(torch.ones(2))
optimizer = hf_swd.AdamS([p], lr=0.1)
p.grad = torch.ones(2)
optimizer.step()
assert p.tolist() != [1.0, 1.0] and optimizer.grad_rms > 0.99
hf_swd.ScheduledWeightDecay(torch.optim.AdamW([p]))
hf_swd.create_adams(torch.nn.Linear(2, 2))
"""


def test_core_works_with_torch_alone():
    run_python(block([*OPTIONAL, "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm"]) + STEP)


def test_trainer_works_without_optional_packages():
    """The Trainer's names are imported when they are used, here by the star."""
    run_python(block(OPTIONAL) + STEP + "from hf_swd import *\nSWDTrainer, SWDCallback, create_adams, register()")


def test_import_brings_no_heavy_package_and_names_need_no_import():
    code = """
        import sys
        import hf_swd
        print(sorted(set(hf_swd.__all__)), sorted(dir(hf_swd)), hf_swd.AdamS, hf_swd.create_adams)
        loaded = {"transformers", "accelerate", "deepspeed", "datasets", "evaluate", "matplotlib"} & set(sys.modules)
        assert not loaded, loaded
    """
    run_python(code)


def test_public_names():
    assert set(hf_swd.__all__) >= PUBLIC
    assert set(dir(hf_swd)) >= PUBLIC
    assert len(hf_swd.__all__) == len(set(hf_swd.__all__))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_swd.no_such_name  # noqa: B018


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a module of the package imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["hf_swd" if node.level else "", node.module or ""]))
            # `from . import x` and `from hf_swd import x` name a module, or something of the package itself.
            found |= {f"hf_swd.{alias.name}" for alias in node.names} if base == "hf_swd" else {base}
    return found


PATHS = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")}


def lower_modules(module: str) -> set[str]:
    """Modules of the package that a module imports; from the package itself it may take the version only."""
    names = {name.split(".")[1] for name in imported_modules(PATHS[module]) if name.startswith("hf_swd.")}
    assert names <= {*PATHS, "__version__"}, (
        f"{module} imports {names - set(PATHS)} from the package, which stands above it"
    )
    return names & set(PATHS)


def reachable(module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        new = lower_modules(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def test_modules_of_the_map_exist():
    assert set(MAP) <= {*PATHS, "zero"}  # the sharded engines come with an issue of their own


@pytest.mark.parametrize("module", PATHS)
def test_imports_run_downwards(module):
    below = reachable(module)
    assert module not in below, f"{module} imports itself in a circle"
    if module in MAP:
        higher = below & set(MAP[MAP.index(module) :])
        assert not higher, f"{module} imports {higher}, which stand above it"


@pytest.mark.parametrize("module", sorted(reachable("adams") | reachable("scheduled_weight_decay") | {"adams"}))
def test_core_knows_nothing_of_hugging_face_or_deepspeed(module):
    packages = {name.split(".")[0] for name in imported_modules(PATHS[module])}
    assert packages <= {"torch", "hf_swd", "__future__"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", PATHS)
def test_only_zero_imports_deepspeed(module):
    assert module == "zero" or not any(name.split(".")[0] == "deepspeed" for name in imported_modules(PATHS[module]))
