"""`optim="adams"` in TrainingArguments and in the Trainer, and what it must leave alone."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from hf_utils import arguments, sentences, tiny_bert
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.training_args import OptimizerNames

import hf_swd
from hf_swd import AdamS, register
from hf_swd.registration import check_trainer


try:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
except ImportError:  # before transformers 5.2
    _OPTIMIZER_HANDLERS = {}


def run_python(code: str, *args: object, path: tuple[object, ...] = ()) -> str:
    """Output of `code` in a new interpreter that finds hf_swd, but has not imported it."""
    path = (*path, Path(hf_swd.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# The name


def test_adams_is_a_member_like_the_others():
    adams = OptimizerNames("adams")
    assert adams is OptimizerNames.ADAMS is OptimizerNames["ADAMS"]
    assert isinstance(adams, OptimizerNames) and (adams.name, adams.value, adams) == ("ADAMS", "adams", "adams")
    # In a model card, for one; how a member is formatted depends on the version of Python.
    assert f"{adams}, {adams!s}" == f"{OptimizerNames.SGD}, {OptimizerNames.SGD!s}".replace("sgd", "adams").replace(
        "SGD", "ADAMS"
    )
    assert list(OptimizerNames)[-1] is adams and len(OptimizerNames) == len(set(OptimizerNames))
    assert copy.deepcopy(adams) is adams and copy.copy(adams) is adams
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(adams, protocol)) is adams
    with pytest.raises(ValueError, match="adamz is not a valid OptimizerNames.*'adams'"):
        OptimizerNames("adamz")


def test_arguments_serialise_adams(tmp_path):
    args = arguments(tmp_path)
    assert args.optim is OptimizerNames.ADAMS
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == "adams"
    assert type(args.to_dict()["optim"]) is str
    assert args.to_sanitized_dict()["optim"] == "adams"
    assert copy.deepcopy(args).optim is pickle.loads(pickle.dumps(args)).optim is OptimizerNames.ADAMS
    assert arguments(tmp_path, optim="adamw_torch").set_optimizer("adams").optim is OptimizerNames.ADAMS


def test_argument_parser_takes_adams_from_argv_json_and_yaml(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    settings = {"output_dir": str(tmp_path), "optim": "adams", "weight_decay": 0.01, "optim_args": "reference_steps=5"}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    (tmp_path / "args.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    for (args,) in (
        parser.parse_args_into_dataclasses(argv),
        parser.parse_json_file(tmp_path / "args.json"),
        parser.parse_yaml_file(tmp_path / "args.yaml"),
    ):
        assert (args.optim, args.weight_decay, args.optim_args) == (OptimizerNames.ADAMS, 0.01, "reference_steps=5")
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "adamz"])
    assert "adams" in capsys.readouterr().err


def test_registering_again_changes_nothing():
    def snapshot():
        return (
            list(OptimizerNames),
            dict(_OPTIMIZER_HANDLERS),
            list(transformers.trainer.DEFAULT_CALLBACKS),
            list(sys.meta_path),
            vars(CallbackHandler).copy(),
            vars(Trainer).copy(),
            vars(TrainingArguments).copy(),
        )

    before = snapshot()
    register()
    register()
    assert snapshot() == before


# The optimizer


def test_trainer_builds_adams_from_its_arguments(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=3e-4,
        adam_beta1=0.8,
        adam_beta2=0.99,
        adam_epsilon=1e-7,
        weight_decay=0.02,
        optim_args="reference_steps=5, amsgrad=True, foreach=1, fused=none, maximize=no",
    )
    trainer = Trainer(tiny_bert(), args, train_dataset=sentences())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is AdamS
    decay, no_decay = optimizer.param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.02, 0.0)
    for group in (decay, no_decay):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.99), 1e-7)
        assert (group["reference_steps"], group["amsgrad"], group["foreach"], group["maximize"]) == (
            5,
            True,
            True,
            False,
        )
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert {names[p] for p in decay["params"]} == set(trainer.get_decay_parameter_names(trainer.model))
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


def test_default_decay_of_adams_does_not_leak_into_the_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), optim="adams", report_to="none", use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert (
        cls([torch.nn.Parameter(torch.ones(1))], **kwargs).param_groups[0]["weight_decay"] == args.weight_decay == 0.0
    )


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        pytest.param(
            "warmup=3",
            r'"warmup=3".*unknown key "warmup"; optim="adams" knows base, reference_steps, unclipped_norm, amsgrad',
            id="unknown-key",
        ),
        pytest.param(
            "reference_step=3", 'unknown key "reference_step"; did you mean "reference_steps"', id="nearly-known"
        ),
        pytest.param("betas=1", 'unknown key "betas"', id="argument-that-the-trainer-sets"),
        pytest.param("amsgrad", r'key=value.*found "amsgrad" without "="', id="no-value"),
        pytest.param("amsgrad=true,", 'found "" without "="', id="trailing-comma"),
        pytest.param("amsgrad=maybe", 'amsgrad="maybe"; expected true or false', id="not-a-boolean"),
        pytest.param("amsgrad=none", 'amsgrad="none"; expected true or false', id="none-where-it-is-not-allowed"),
        pytest.param("fused=2", 'fused="2"; expected true, false or none', id="not-an-optional-boolean"),
        pytest.param(
            "reference_steps=1.5", 'reference_steps="1.5"; expected a number of optimizer steps', id="fraction"
        ),
        pytest.param("reference_steps=-1", 'reference_steps="-1"; expected', id="negative"),
        pytest.param("reference_steps=", 'reference_steps=""; expected', id="empty"),
        pytest.param("reference_steps=1=2", 'reference_steps="1=2"; expected', id="two-equals-signs"),
    ],
)
def test_bad_optim_args_are_refused_when_arguments_are_made(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), optim="adams", optim_args=optim_args, use_cpu=True)
    args = arguments(tmp_path, optim_args=None)
    args.optim_args = optim_args
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_bert(), args, train_dataset=sentences())


def test_optim_args_of_other_optimizers_are_not_looked_at(tmp_path):
    Trainer(tiny_bert(), arguments(tmp_path, optim="adafactor", optim_args="warmup=3"), train_dataset=sentences())


@pytest.mark.parametrize(
    ("given", "is_ours"),
    [(None, False), ((torch.optim.AdamW, {}), False), ((lambda params: None, {}), False), ((AdamS, {}), True)],
    ids=["nothing", "AdamW", "function", "AdamS"],
)
def test_optimizer_of_deepspeeds_configuration_is_refused_only_in_the_place_of_adams(given, is_ours):
    """`tests/distributed/test_refusals.py` has it with DeepSpeed itself."""
    config = SimpleNamespace(config={"optimizer": {"type": "AdamW"}})
    args = SimpleNamespace(optim="adamw_torch", deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
    trainer = SimpleNamespace(args=args, optimizer_cls_and_kwargs=given)
    with pytest.raises(ValueError, match='"type": "AdamW"') if is_ours else contextlib.nullcontext():
        check_trainer(trainer)


# Processes


def test_transformers_without_hf_swd_is_what_it_was(tmp_path):
    """One process: transformers before `import hf_swd`; a pickle that needs it while it cannot be had, and can."""
    torch.save(arguments(tmp_path / "out"), tmp_path / "training_args.bin")
    code = """
import json, sys
import torch
from transformers.training_args import OptimizerNames, TrainingArguments
try:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
except ImportError:  # before transformers 5.2
    handlers = {}

assert "hf_swd" not in sys.modules
names = [[n.name, n.value, f"{handlers[n].__module__}.{handlers[n].__qualname__}" if n in handlers else ""]
         for n in OptimizerNames]
print("BEFORE", json.dumps(names))
try:
    TrainingArguments("out", optim="adams")
except ValueError as error:
    print("REFUSED", error)

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_swd":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    torch.load(sys.argv[1], weights_only=False)
except ModuleNotFoundError as error:
    print("NOT INSTALLED", error)
del sys.meta_path[0]
args = torch.load(sys.argv[1], weights_only=False)
assert args.optim is OptimizerNames.ADAMS and "hf_swd" in sys.modules
assert not handlers or handlers["adams"].__module__ == "hf_swd.registration"

# The callback needs no Trainer; SWDTrainer imports transformers.trainer, which is patched on the way.
import hf_swd.trainer.callback
assert "transformers.trainer" not in sys.modules
from hf_swd.trainer import SWDCallback, SWDTrainer
assert not any(type(finder).__module__.startswith("hf_swd") for finder in sys.meta_path)
"""
    output = run_python(code, tmp_path / "training_args.bin")
    lines = dict(
        line.split(" ", 1) if not line.startswith("NOT") else line.split("INSTALLED ")
        for line in output.splitlines()
        if " " in line
    )
    handlers = {name: f"{f.__module__}.{f.__qualname__}" for name, f in _OPTIMIZER_HANDLERS.items()}
    ours = [[name.name, name.value, handlers.get(name, "")] for name in OptimizerNames]
    assert ours[:-1] == json.loads(lines["BEFORE"]) and ours[-1][1] == "adams"
    assert "adams is not a valid OptimizerNames, please select one of" in lines["REFUSED"]
    assert "hf_swd" in lines["NOT "]


def test_import_of_hf_swd_waits_for_transformers():
    """One process: nothing of transformers is imported early, its modules keep their specs; four threads import it."""
    code = """
import importlib, importlib.util, sys, threading
import hf_swd

assert "transformers" not in sys.modules
original = sys.meta_path[:]
names = ["transformers.training_args", "transformers.trainer_optimizer", "transformers.trainer"]
import transformers
if importlib.util.find_spec(names[1]) is None:  # before transformers 5.2
    del names[1]
assert not set(names) & set(sys.modules)
found = importlib.util.find_spec(names[0])
assert found.name == names[0] and names[0] not in sys.modules

failures = []
def load():
    try:
        from transformers import TrainingArguments
        assert TrainingArguments("out", optim="adams", use_cpu=True).optim.name == "ADAMS"
        import transformers.trainer
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=load) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failures, failures

reference = sys.modules["transformers.trainer_callback"]
for name in names:
    module = sys.modules[name]
    assert module.__spec__.loader is module.__loader__ and type(module.__loader__) is type(reference.__loader__), name
    assert vars(module.__loader__).keys() == vars(reference.__loader__).keys(), name
    assert module.__spec__.origin == module.__file__
ours = [finder for finder in original if type(finder).__module__ == "hf_swd.registration"]
assert len(ours) == 1 and not set(ours) & set(sys.meta_path)
others = [finder for finder in original if finder not in ours]
assert others == [finder for finder in sys.meta_path if finder in original]

module = sys.modules[names[0]]
assert importlib.reload(module) is module and "ADAMS" not in module.OptimizerNames.__members__
hf_swd.register()
assert module.TrainingArguments("out", optim="adams", use_cpu=True).optim.name == "ADAMS"
"""
    run_python(code)


RACE = """
import contextlib, json, os, sys, threading, time, traceback, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # since Python 3.12
with contextlib.suppress(ImportError):
    import datasets
import torch, transformers.modeling_utils, transformers.integrations, transformers.data.data_collator

class Pause:
    "Holds up the first thread that imports a module, with the locks that it has, until the other had time to wait."
    def __init__(self, name):
        self.name, self.reached = name, threading.Event()
    def find_spec(self, name, path=None, target=None):
        if name == self.name and not self.reached.is_set():
            self.reached.set()
            time.sleep(0.3)

def race(first, second, pause):
    pause = Pause(pause)
    sys.meta_path.insert(0, pause)
    barrier, errors = threading.Barrier(2), []
    def run(statement, wait):
        barrier.wait()
        if wait:
            pause.reached.wait(1)
        try:
            exec(statement, {})
        except BaseException:
            errors.append(f"{statement}: {traceback.format_exc()}")
    threads = [threading.Thread(target=run, args=(first, False)),
               threading.Thread(target=run, args=(second, bool(pause.name)))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors, errors
    import hf_swd
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments("out", optim="adams", use_cpu=True, report_to="none")
    trainer = Trainer(torch.nn.Linear(2, 2), args)
    assert type(trainer.create_optimizer()) is hf_swd.AdamS
    assert hasattr(type(trainer.callback_handler).on_train_begin, "__wrapped__")
    assert not any(type(finder).__module__.startswith("hf_swd") for finder in sys.meta_path)

prepare, races, repetitions = json.loads(sys.argv[1])
exec(prepare)
assert "transformers.training_args" not in sys.modules
for number in range(len(races) * repetitions):
    sys.stdout.flush()
    process = os.fork()
    if not process:
        try:
            race(*races[number // repetitions])
        except BaseException:
            print(races[number // repetitions], traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
        if time.monotonic() > deadline:
            os.kill(process, 9)
            os.waitpid(process, 0)
            print(races[number // repetitions], "hangs", flush=True)
            break
"""
OF_OTHERS = ("real_accelerator", "torchao", "register_constant() on Enum", "opaque value type", "kernels-community")
OURS = ["from hf_swd.trainer import SWDTrainer", "from hf_swd import SWDCallback", "import hf_swd; hf_swd.register()"]


@pytest.mark.parametrize("prepare", ["import hf_swd", ""], ids=["registered", "not-imported"])
def test_threads_import_transformers_and_hf_swd_at_the_same_time(prepare):
    """In many orders: one of them is held up in the middle, or both begin at once. No warning of ours or of the import
    system's, and adams is there."""
    theirs = "import transformers.trainer"
    if not prepare:
        theirs = "import torch\n" + theirs  # so that hf_swd has a chance to come first
    races = []
    for ours in OURS if prepare else OURS[::2]:
        # Both import trainer_callback; transformers.trainer also imports trainer_optimizer, after it.
        races += [(theirs, ours, None), (theirs, ours, "transformers.trainer_optimizer")]
        races += [(theirs, ours, "transformers.trainer_callback"), (ours, theirs, "hf_swd.trainer")]
        races += [(ours, theirs, "transformers.trainer_callback"), (ours, theirs, "transformers.trainer_optimizer")]
    output = run_python(RACE, json.dumps([prepare, races, 1]))
    # Other packages that are installed may have something to say, as DeepSpeed, torchao and bitsandbytes do.
    assert [line for line in output.splitlines() if not any(name in line for name in OF_OTHERS)] == []


def stand_in(folder: Path, version: str) -> Path:
    """A transformers without the private names, since only one real version can be installed."""
    package = folder / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    (package / "training_args.py").write_text(
        "import os\n"
        "if os.environ.pop('BROKEN', None):\n"
        "    raise KeyError('broken on purpose')\n"
        "from enum import Enum\n"
        "class OptimizerNames(str, Enum):\n"
        "    SGD = 'sgd'\n"
        "class TrainingArguments:\n"
        "    def __init__(self, optim, optim_args=None):\n"
        "        self.optim, self.optim_args = optim, optim_args\n"
        "        self.__post_init__()\n"
        "    def __post_init__(self):\n"
        "        self.optim = OptimizerNames(self.optim)\n"
    )
    (package / "trainer_optimizer.py").write_text("")
    (package / "trainer.py").write_text(
        "import transformers.trainer_optimizer\n"
        "class Trainer: pass\n"
        "class CallbackHandler:\n"
        "    def on_init_end(self, args, state, control): pass\n"
        "    def on_train_begin(self, args, state, control): pass\n"
    )
    return folder


def test_transformers_that_cannot_be_patched_is_left_usable_and_named(tmp_path):
    code = """
import os
import hf_swd

os.environ["BROKEN"] = "1"
try:
    import transformers.training_args
except KeyError as error:
    assert error.args == ("broken on purpose",)
import transformers.trainer
from transformers.training_args import OptimizerNames, TrainingArguments
assert OptimizerNames("adams").name == "ADAMS"
assert TrainingArguments("sgd").optim is OptimizerNames.SGD
try:
    TrainingArguments("adams")
except RuntimeError as error:
    print("RAISED", error)

# What has failed is tried again before anybody is refused.
import transformers.trainer_optimizer
transformers.trainer_optimizer._OPTIMIZER_HANDLERS = {}
TrainingArguments("adams", "reference_steps=1")
assert list(transformers.trainer_optimizer._OPTIMIZER_HANDLERS) == ["adams"]
"""
    output = run_python(code, path=(stand_in(tmp_path, "5.9.0"),))
    raised, warned = output.splitlines()
    for message in (raised, warned):
        assert (
            "transformers 5.9.0: cannot patch transformers.trainer_optimizer "
            "(transformers.trainer_optimizer has no _OPTIMIZER_HANDLERS)" in message
        )
        assert "supports transformers 4.46 and later" in message
    assert raised.startswith("RAISED")


def test_transformers_that_is_too_old_is_named_at_import_and_when_arguments_are_made(tmp_path):
    code = """
import hf_swd
import transformers.trainer
from transformers.training_args import OptimizerNames, TrainingArguments
assert TrainingArguments("sgd").optim is OptimizerNames.SGD
try:
    TrainingArguments("adams")
except RuntimeError as error:
    print("RAISED", error)
"""
    raised, warned = run_python(code, path=(stand_in(tmp_path, "4.45.2"),)).splitlines()
    for message in (raised, warned):
        assert "transformers 4.45.2" in message and "this version is too old" in message
        assert "supports transformers 4.46 and later" in message
    assert raised.startswith("RAISED")
