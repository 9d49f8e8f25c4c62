"""What `import hf_swd` needs, what it brings, and in which direction its modules import one another."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hf_swd


PACKAGE = Path(hf_swd.__file__).parent
PUBLIC = {"AdamS", "ScheduledWeightDecay", "attach", "create_adams", "SWDTrainer", "SWDCallback", "register"}
OPTIONAL = "deepspeed datasets evaluate matplotlib scipy sklearn pandas tensorboard trl peft".split()


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
        import hf_swd.trainer, hf_swd.trainer.optim_args, hf_swd.commands.launch, hf_swd.commands.plot
        loaded = {"transformers", "accelerate", "deepspeed", "datasets", "evaluate", "matplotlib"} & set(sys.modules)
        assert not loaded, loaded
        from hf_swd.trainer import SWDCallback
        assert "transformers.trainer_callback" in sys.modules and "transformers.trainer" not in sys.modules
        assert SWDCallback is hf_swd.SWDCallback and "SWDTrainer" in dir(hf_swd.trainer)
    """
    run_python(code)


def test_import_and_command_line_do_without_torch(tmp_path):
    code = f"""
        import sys
        import hf_swd
        sys.modules["torch"] = None
        from hf_swd.commands.launch import main
        try:
            main(["--version"])
        except SystemExit as exit:
            assert exit.code == 0
        log = [{{"step": 1, "loss": 1.0}}, {{"step": 2, "loss": 0.5}}]
        import json, pathlib
        folder = pathlib.Path({str(tmp_path)!r})
        (folder / "trainer_state.json").write_text(json.dumps({{"log_history": log}}))
        assert main(["plot", str(folder)]) == 0 and (folder / "swd_plot.png").is_file()
        log = [{{"grad_norm": 1.0, "learning_rate": 0.1, **entry}} for entry in log]
        (folder / "trainer_state.json").write_text(json.dumps({{"log_history": log}}))
        assert main(["advise", str(folder)]) == 0
    """
    assert run_python(code).startswith(f"hf-swd {hf_swd.__version__}")


def test_nothing_is_registered_if_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("HF_SWD_NO_REGISTER", "1")
    code = """
        import sys
        before = sys.meta_path[:]
        import hf_swd
        assert sys.meta_path == before
        from hf_swd import SWDTrainer, SWDCallback
        from transformers import Trainer
        from transformers.training_args import OptimizerNames, TrainingArguments
        import torch
        assert "adams" not in set(OptimizerNames) and not hasattr(Trainer._inner_training_loop, "__wrapped__")
        trainer = SWDTrainer(torch.nn.Linear(2, 2), TrainingArguments("out", use_cpu=True, report_to="none"))
        assert any(isinstance(callback, SWDCallback) for callback in trainer.callback_handler.callbacks)
        hf_swd.register()
        assert TrainingArguments("out", optim="adams", use_cpu=True).optim is OptimizerNames("adams")
    """
    run_python(code)


def test_public_names():
    assert set(hf_swd.__all__) >= PUBLIC
    assert set(dir(hf_swd)) >= PUBLIC
    assert len(hf_swd.__all__) == len(set(hf_swd.__all__))


@pytest.mark.parametrize("package", ["hf_swd", "hf_swd.trainer"])
def test_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(package).no_such_name  # noqa: B018


# Architecture

# From the bottom up: what a module of the package may import stands in its own layer or below. Names are those below
# `hf_swd`, packages stand for all of their modules, and "" is the package itself.
LAYERS = [
    ["core"],
    ["engines"],
    ["adams", "scheduled_weight_decay"],
    ["param_groups"],
    ["trainer"],
    ["registration"],
    ["commands"],
    ["", "__main__"],
]
# Beside torch and the standard library.
PACKAGES = {
    "param_groups": {"typing_extensions"},  # of type checkers only
    "engines.zero": {"deepspeed"},
    "engines.refusals": {"packaging"},
    "trainer": {"accelerate", "transformers"},
    "trainer.watch": {"tqdm"},  # which transformers needs, too
    "registration": {"transformers"},
    "commands.run_log": {"safetensors"},  # which transformers needs, too
    "commands.plot": {"matplotlib"},
    "commands.plot_decay": {"matplotlib"},
}
# Names that only one module may know: the marks that engines leave on parameters, and engines' insides.
INSIDES = {
    "engines.zero": r"_hp_mapping|_z3_optimizer|ds_(id|numel|tensor|shape|status)",
    "engines.refusals": r"ds_is_replaced_module",
    "engines.tensor_parallel": r"_tp_size|tp_plan",
    "engines.fsdp1": r"_fsdp_flattened|_flat_param|flat_param|_shard_param_infos|_shard_numel_padded|_use_orig_params",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(PATHS)


def layer(module: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if module in names or module.split(".")[0] in names)
    return found


BY_NAME = {"import_module", "__import__", "find_spec", "resolve_name", "run_module", "reload"}


def imports(source: str, module: str = "", *, is_package: bool = False) -> set[str]:
    """
    Absolute names of everything that the source of a module imports: at its top or within a function, by a statement
    or by name.

    An import by a name that is only known when it runs may be of whatever the module names: then all its strings that
    are names of modules of the package count.
    """
    absolute = ["hf_swd", *filter(None, module.split("."))]
    found, computed, strings = set(), False, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = absolute[: len(absolute) - node.level + is_package] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from package import x` names a module, or something of the package itself.
            found |= {resolved(base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings |= {node.value} & {f"hf_swd.{name}" for name in PATHS if name}
        name = None
        if isinstance(node, ast.Call) and node.args:
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", None))
            of_modules = isinstance(function, ast.Attribute) and is_sys_modules(function.value)
            if called in BY_NAME or (of_modules and called in ("get", "pop", "setdefault", "__getitem__")):
                name = node.args[0]
        elif isinstance(node, ast.Subscript) and is_sys_modules(node.value):
            name = node.slice
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            level = len(name.value) - len(name.value.lstrip("."))
            above = absolute[: len(absolute) - level + is_package] if level else []
            found.add(".".join([*above, name.value.lstrip(".")]))
        elif name is not None:
            computed = True
    return found | strings if computed else found


def is_sys_modules(node: ast.expr) -> bool:
    return ast.unparse(node) in ("sys.modules", "modules")


def resolved(base: str, name: str) -> str:
    """What `from base import name` imports."""
    if base.partition(".")[0] != "hf_swd":
        return base
    below = f"{base}.{name}".partition(".")[2]
    return f"{base}.{name}" if below in PATHS or below == "__version__" else base


def imported_by(module: str) -> set[str]:
    path = PATHS[module]
    return imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")


def own_imports(module: str) -> set[str]:
    """Modules of the package that one of them imports, under their names below `hf_swd`."""
    names = {name.partition(".")[2] for name in imported_by(module) if name.partition(".")[0] == "hf_swd"}
    return names - {"__version__"}  # the only thing of the package itself that those below it may use


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import hf_swd.adams as a", "hf_swd.adams"),
        ("def f():\n    from .callback import SWDCallback", "hf_swd.trainer.callback"),
        ("from . import callback", "hf_swd.trainer.callback"),
        ("from ..adams import AdamS", "hf_swd.adams"),
        ("from .. import AdamS", "hf_swd"),
        ("from .. import __version__", "hf_swd.__version__"),
        ("from hf_swd import registration", "hf_swd.registration"),
        ("import importlib\nimportlib.import_module('hf_swd.adams')", "hf_swd.adams"),
        ("from importlib import import_module\nimport_module('.callback', __package__)", "hf_swd.trainer.callback"),
        ("__import__('hf_swd.adams')", "hf_swd.adams"),
        ("import sys\nsys.modules['hf_swd.adams'].AdamS", "hf_swd.adams"),
        ("import sys\nsys.modules.get('hf_swd.adams')", "hf_swd.adams"),
        ("names = {'hf_swd.adams': 1}\nfor name in names:\n    importlib.import_module(name)", "hf_swd.adams"),
        ("import logging\nlogging.getLogger('hf_swd.trainer')", "logging"),
    ],
)
def test_what_counts_as_an_import(source, expected):
    found = imports(source, "trainer.watch")
    assert expected in found
    assert {name for name in found if name.startswith("hf_swd")} <= {expected}


def test_every_module_has_a_layer():
    assert {"adams", "scheduled_weight_decay", "registration", "commands.launch", "trainer.callback"} <= set(MODULES)
    for module in MODULES:
        layer(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    higher = {name for name in own_imports(module) if layer(name) > layer(module)}
    assert not higher, f"{module} imports {higher}, which stand above it"


def test_no_circle():
    below = {module: own_imports(module) - {""} for module in MODULES}
    while free := [module for module, needed in below.items() if not needed & below.keys()]:
        for module in free:
            del below[module]
    assert not below, f"in circles, or above them: {below}"


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_imported_where_they_belong(module):
    """The core knows nothing of Hugging Face or DeepSpeed; only one module of the engines imports DeepSpeed."""
    allowed = {"hf_swd", "torch", "__main__", *sys.stdlib_module_names}
    for name, packages in PACKAGES.items():
        if f"{module}.".startswith(f"{name}."):
            allowed |= packages
    found = {name.split(".")[0] for name in imported_by(module)} - allowed
    assert not found, f"{module} imports {found}"


@pytest.mark.parametrize("module", MODULES)
def test_insides_of_engines_are_named_where_they_belong(module):
    source = PATHS[module].read_text(encoding="utf-8")
    for owner, names in INSIDES.items():
        assert module == owner or not (found := re.findall(rf"\b(?:{names})\b", source)), f"{module} names {found}"
