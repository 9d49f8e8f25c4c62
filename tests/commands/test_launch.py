"""`hf-swd run`: scripts that know nothing of hf_swd behave as under plain python; all their processes have `adams`."""

from __future__ import annotations

import json
import os
import py_compile
import re
import signal
import subprocess
import sys
import zipfile
from multiprocessing import spawn
from pathlib import Path

import pytest

import hf_swd
from hf_swd.commands.launch import main


PYTHON = [sys.executable]
RUN = [sys.executable, "-m", "hf_swd", "run"]
# What pip writes as `hf-swd`, but for one process per case: importing torch, the slow part, is done before they fork.
CONSOLE_SCRIPT = """
import json, os, sys
import hf_swd
from hf_swd.commands.launch import main
if __name__ == '__main__':
    for name, arguments in json.load(sys.stdin).items():
        process = os.fork()
        if not process:
            for stream in (1, 2):
                os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
            sys.argv[1:] = ["run", *arguments]
            break
        with open(f"{name}.0", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])))
    else:
        sys.exit()
    sys.exit(main())
"""

# Exercises what depends on __main__; its annotation tells whether our `from __future__ import annotations` has leaked.
PROBE = """
import __main__
import dataclasses, inspect, os, pickle, sys, typing

@dataclasses.dataclass
class Point:
    x: int = 1

def annotated(point: Point): ...

if __name__ == "__main__":
    print(sys.argv, repr(sys.path[0]), __file__, __package__, __spec__ and __spec__.name, __doc__, type(__builtins__))
    print(__main__.__dict__ is globals(), annotated.__annotations__, typing.get_type_hints(Point))
    print(pickle.loads(pickle.dumps(Point(3))), type(__loader__).__name__)
    print(inspect.getsource(Point), inspect.getsource(annotated), inspect.getfile(sys.modules["__main__"]))
    print("to stderr", file=sys.stderr)
    sys.exit(3)
"""
UNCAUGHT = """
import atexit, sys, threading, time
atexit.register(print, "at exit", __name__)
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()

def fails(key):
    try:
        {}[key]
    except KeyError:
        raise ValueError("chained")

fails(1)
"""
OWN_HOOK = """
import sys
sys.excepthook = lambda kind, error, traceback: print("hook", kind, error, traceback.tb_lineno, traceback.tb_next)
raise RuntimeError("seen by the hook of the script")
"""
SPAWN = """
import multiprocessing, sys

class Message:
    def __init__(self, *content):
        self.content = content

def child(queue, depth):
    finder = [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__.startswith("hf_swd")]
    queue.put(Message(depth, __name__, sys.argv[1:], finder))
    if depth < 2:
        process = multiprocessing.get_context("spawn").Process(target=child, args=(queue, depth + 1))
        process.start()
        process.join()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, 1))
    process.start()
    for _ in range(2):
        print(*queue.get(timeout=100).content)
    process.join()
    print(process.exitcode)
"""

# The whole of a user's script: no word of ours.
ARGUMENT_PARSER = """
import sys
from transformers import HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    print(optimizer.__name__, settings["weight_decay"], settings["reference_steps"], sys.argv[0])
    raise RuntimeError("the end")
"""
DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    sys.stdout.write(f"rank {dist.get_rank()} total {total.item()} {sys.argv[1:]} {'hf_swd' in sys.modules}\\n")
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scripts, modules, a folder and a zip file to run."""
    folder = tmp_path_factory.mktemp("scripts")
    contents = {
        "probe.py": PROBE,
        "package/__init__.py": "",
        "package/__main__.py": PROBE,
        "package/failing.py": UNCAUGHT,
        "application/__main__.py": PROBE,
        "uncaught.py": UNCAUGHT,
        "own_hook.py": OWN_HOOK,
        "message.py": "import sys\nsys.exit('a message')\n",
        "interrupted.py": "raise KeyboardInterrupt\n",
        "syntax.py": "x = = 1\n",
        "spawn.py": SPAWN,
        "argument_parser.py": ARGUMENT_PARSER,
        "distributed.py": DISTRIBUTED,
        "no_main/__init__.py": "",
        "needs_missing/__init__.py": "import a_package_that_is_not_installed\n",
        "console_script": CONSOLE_SCRIPT,
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "link").mkdir()
    (folder / "link" / "probe.py").symlink_to("../probe.py")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    py_compile.compile(str(folder / "message.py"), cfile=str(folder / "compiled.pyc"))
    return folder


def start(command, folder, **pipes):
    path = os.pathsep.join(filter(None, [str(Path(hf_swd.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def finish(process, text=None):
    out, err = process.communicate(text, timeout=300)
    return process.returncode, out, err


def without_runpy(traceback):
    """A traceback of `python -m` begins with the interpreter's own frames; ours with the script's."""
    return re.sub(r'  File "(<frozen (runpy|importlib)|.*runpy\.py").*\n(    .*\n)*', "", traceback)


CASES = {
    "script": (["probe.py", "--help", "-m", "--", "--version"], 3),
    "script-by-link": (["link/probe.py"], 3),
    "module": (["-m", "package", "run", "-h"], 3),
    "folder": (["./application/"], 3),
    "zip-file": (["archive.zip", "-x"], 3),
    "compiled": (["compiled.pyc"], 1),
    "uncaught-exception": (["uncaught.py"], 1),
    "uncaught-exception-of-module": (["-m", "package.failing"], 1),
    "import-error-of-package": (["-m", "needs_missing"], 1),
    "own-excepthook": (["own_hook.py"], 1),
    "exit-with-message": (["message.py"], 1),
    "keyboard-interrupt": (["interrupted.py"], -signal.SIGINT),
    "syntax-error": (["syntax.py"], 1),
}


@pytest.fixture(scope="module")
def results(folder):
    """What plain python and `hf-swd run` do with every case: exit code, stdout, stderr."""
    ours = start([*PYTHON, "console_script"], folder, stdin=subprocess.PIPE)
    plain = {name: finish(start([*PYTHON, *arguments], folder)) for name, (arguments, _) in CASES.items()}
    assert finish(ours, json.dumps({name: arguments for name, (arguments, _) in CASES.items()})) == (0, "", "")
    code, out, err = ({name: (folder / f"{name}.{file}").read_text() for name in CASES} for file in "012")
    return {name: (plain[name], (int(code[name]), out[name], err[name])) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_script_runs_as_under_plain_python(results, name):
    plain, ours = results[name]
    assert plain[0] == CASES[name][1]
    assert ours[0] == plain[0]
    assert ours[1] == plain[1]
    assert ours[2] == without_runpy(plain[2])


def test_registered_in_spawned_processes_and_their_children(folder):
    plain, ours = (
        finish(process)
        for process in [start([*PYTHON, "spawn.py", "-x"], folder), start([*RUN, "spawn.py", "-x"], folder)]
    )
    assert plain[:2] == (0, "1 __mp_main__ ['-x'] []\n2 __mp_main__ ['-x'] []\n0\n")
    assert ours == (0, plain[1].replace("[]", "['hf_swd.registration']"), "")


def test_unmodified_script_under_accelerate_launch_gets_adams(folder):
    launch = [*PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_swd", "run"]
    options = "--output_dir out --use_cpu --optim adams --weight_decay 0.25 --optim_args reference_steps=7".split()
    code, out, err = finish(start([*launch, "argument_parser.py", *options], folder))
    assert code == 1
    assert out == "AdamS 0.25 7 argument_parser.py\n", err
    traceback = err[err.index("Traceback") :]
    script = folder / "argument_parser.py"
    assert traceback.startswith(f'Traceback (most recent call last):\n  File "{script}", line 9, in <module>\n')


def test_unmodified_script_under_torchrun_runs_in_every_process(folder):
    launch = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_swd", "run"]
    code, out, err = finish(start([*launch, "distributed.py", "--help"], folder))
    assert code == 0, err
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9 announces itself
    assert sorted(lines) == [f"rank {rank} total 3 ['--help'] True" for rank in range(2)]


@pytest.fixture
def this_process(monkeypatch, folder):
    """Undoes what `run` sets before it finds that there is nothing to run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    before = dict(sys.modules["__main__"].__dict__)
    yield
    assert sys.modules["__main__"].__dict__ == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["missing.py"], "can't open file '{folder}/missing.py': [Errno 2] No such file or directory", id="script"
        ),
        pytest.param(["link"], "can't find '__main__' module in '{folder}/link'", id="folder-without-main"),
        pytest.param(["-m", "missing"], "no module named 'missing'", id="module"),
        pytest.param(["-m", "missing.part"], "no module named 'missing.part'", id="module-in-missing-package"),
        pytest.param(["-m", "package.missing"], "no module named 'package.missing'", id="module-in-package"),
        pytest.param(["-m", "no_main"], "no module named 'no_main.__main__'", id="package-without-main"),
        pytest.param(["-m", ".package"], "relative module names are not supported: '.package'", id="relative-module"),
        pytest.param(["-m", "sys"], "no Python code in module 'sys'", id="built-in-module"),
    ],
)
def test_target_that_is_not_there_is_an_error_that_names_it(this_process, folder, capsys, arguments, message):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-swd run: {message.format(folder=folder)}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run"], "hf-swd run: error: SCRIPT or -m MODULE is missing", id="no-script"),
        pytest.param(["run", "-m"], "hf-swd run: error: MODULE is missing", id="no-module"),
        pytest.param(
            ["run", "--optim", "x.py"], "hf-swd run: error: unknown option '--optim'", id="option-before-script"
        ),
        pytest.param([], "hf-swd: error: ", id="no-command"),
        pytest.param(["train"], "'train'", id="unknown-command"),
        pytest.param(["plot"], "OUTPUT_DIR", id="no-output-dir"),
    ],
)
def test_incomplete_command_line_is_a_usage_error(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("usage: hf-swd")
