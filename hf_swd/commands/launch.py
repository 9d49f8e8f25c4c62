"""The command line, `hf-swd` or `python -m hf_swd`: `run` a script with `optim="adams"`, `plot` its log, or `advise`.

`run` executes the script in this process, as the `__main__` module, so that a distributed launcher can start it:

    hf-swd run run_glue.py --optim adams ...
    accelerate launch -m hf_swd run run_glue.py --optim adams ...
    torchrun --nproc_per_node 2 -m hf_swd run run_glue.py --optim adams ...

Processes that the script starts with `multiprocessing` are registered too, whatever the start method; a Python that
it starts by other means (`subprocess`, `os.exec`) is not: there, `import hf_swd` or `hf-swd run` again. The script can
tell the difference from a plain `python` only by looking: our frames lie below its own on the stack, and
`sys.orig_argv` shows the real command line.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from multiprocessing import spawn
from types import CodeType, ModuleType, TracebackType
from typing import Any


# First parts of the names of modules whose frames can lie between `main` and the script's own code.
_OWN = ("hf_swd", "importlib", "zipimport")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): the arguments after the program's name.

    Returns:
        `int`: exit code: 0 for success, 1 if there was nothing to read, 2 if the command line names something that is
        not there. Whatever the script of `run` raises, `SystemExit` included, is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, run_parser = _parsers()
    # By hand, because every word after SCRIPT is the script's, also `--help` and `--`.
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        module = argv[1:2] == ["-m"]
        target = argv[2 if module else 1 :]
        if not target:
            run_parser.error("MODULE is missing" if module else "SCRIPT or -m MODULE is missing")
        if not module and target[0].startswith("-"):
            run_parser.error(f"unknown option {target[0]!r}; options of the script go after SCRIPT")
        return _run(target[0], target[1:], module)
    args = parser.parse_args(argv)
    if args.command == "plot" and args.metric and args.against != "weight_decay":
        parser.error("--metric needs --against weight_decay: over the steps, all that was logged is drawn")
    try:
        if args.command == "advise":
            from .advise import advise

            print("\n".join(advise(args.output_dirs, args.metric).lines))
        elif args.against == "weight_decay":
            from .plot_decay import plot_against_decay

            print(plot_against_decay(args.output_dirs, args.output, args.metric))
        else:
            from .plot import plot_runs

            print(plot_runs(args.output_dirs, args.output))
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-swd {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="hf-swd", description="Scheduled Weight Decay for Hugging Face Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-swd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,plot,advise}")
    run = commands.add_parser(
        "run",
        usage="hf-swd run SCRIPT [ARGS...]\n       hf-swd run -m MODULE [ARGS...]",
        help='run an unmodified script with optim="adams" registered',
        description="Runs SCRIPT (a file, or a folder or zip file with a __main__.py) or MODULE as `python` would, "
        'with `TrainingArguments(optim="adams")` and `--optim adams` available. All ARGS are the script\'s.',
    )
    plot = commands.add_parser(
        "plot",
        help="draw loss, gradient norm and effective weight decay of one or several runs",
        description="Draws loss, gradient norm and effective weight decay over optimizer steps, several runs "
        "overlaid, from the trainer_state.json of each OUTPUT_DIR or of its last checkpoint. Needs matplotlib.",
    )
    advise = commands.add_parser(
        "advise",
        help="say which weight decay to try next, from one or several finished runs",
        description="Says of finished runs, with AdamS, AdamW or another optimizer, whether weight decay mattered and "
        "which to try next. Runs that differ in weight decay and seed are compared with each other. The last line has "
        "arguments for the next run.",
    )
    for command in (plot, advise):
        command.add_argument(
            "output_dirs", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a Trainer, or a folder of several"
        )
        command.add_argument(
            "--metric",
            metavar="NAME",
            help="key of the evaluations that decides (default: that of load_best_model_at_end, or else eval_loss)",
        )
    plot.add_argument(
        "--against",
        choices=("step", "weight_decay"),
        default="step",
        help="weight_decay: the metric at the end of each run, with the weight decay to try next (default: step)",
    )
    plot.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="image to write, in a folder that is made if it is missing, its format taken from the suffix: .png, "
        ".pdf, .svg (default: swd_plot.png in the first OUTPUT_DIR)",
    )
    return parser, run


def _run(target: str, arguments: list[str], is_module: bool) -> int:
    _register_here_and_in_children()
    sys.argv[:] = ["-m" if is_module else target, *arguments]
    try:
        code = _load_module(target) if is_module else _load_script(target)
        exec(code, sys.modules["__main__"].__dict__)
    except _NotFoundError as error:
        print(f"hf-swd run: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        # Raised on, so that the interpreter ends the process as it always does: the script's own excepthook, exit
        # code, SIGINT.
        _hide_own_frames(error)
        raise
    return 0


class _NotFoundError(Exception):
    """What the command line asks to run is not there."""


def _load_script(path: str) -> CodeType:
    """Makes `sys.path[0]` and a new `__main__` those of `python path`, and returns the code to execute."""
    absolute = os.path.join(os.getcwd(), path)
    importer = pkgutil.get_importer(absolute)
    if importer is not None:  # a folder or a zip file
        _set_first_path(absolute, always=True)
        spec = importer.find_spec("__main__")
        if spec is None:
            raise _NotFoundError(f"can't find '__main__' module in {absolute!r}")
        return _load_spec(spec)

    _set_first_path(os.path.dirname(os.path.realpath(absolute)))
    try:
        with open(absolute, "rb") as file:
            source = file.read()
    except OSError as error:
        raise _NotFoundError(f"can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}") from None
    compiled = absolute.endswith(".pyc")
    loader = (SourcelessFileLoader if compiled else SourceFileLoader)("__main__", absolute)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=absolute, __cached__=None, __loader__=loader)
    _set_main(main)
    return _code(loader, "__main__", absolute) if compiled else compile(source, absolute, "exec", dont_inherit=True)


def _load_module(name: str) -> CodeType:
    """Makes `sys.path[0]`, `sys.argv[0]` and a new `__main__` those of `python -m name`, and returns the code."""
    if name.startswith("."):
        raise _NotFoundError(f"relative module names are not supported: {name!r}")
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise  # the package is there; something that it imports is not
        raise _NotFoundError(f"no module named {name!r}: {error}") from None
    if spec is None:
        raise _NotFoundError(f"no module named {name!r}")
    sys.argv[0] = spec.origin or name
    return _load_spec(spec)


def _load_spec(spec: ModuleSpec) -> CodeType:
    code = _code(spec.loader, spec.name, spec.origin)
    _set_main(importlib.util.module_from_spec(spec))
    return code


def _code(loader: Any, name: str, origin: str | None) -> CodeType:
    code: CodeType | None = loader.get_code(name) if hasattr(loader, "get_code") else None
    if code is None:
        raise _NotFoundError(f"no Python code in module {name!r} ({origin})")
    return code


def _set_main(content: ModuleType) -> None:
    """Refills `__main__` in place: those who hold it since an import (multiprocessing, dill) must see the script."""
    namespace = sys.modules["__main__"].__dict__
    namespace.clear()
    namespace.update(content.__dict__, __name__="__main__", __builtins__=builtins)


def _set_first_path(entry: str, always: bool = False) -> None:
    """Puts `entry` where `python` put the folder of the console script, or nothing if told so by `-P` or `-I`."""
    safe = getattr(sys.flags, "safe_path", sys.flags.isolated)
    if always or not safe:
        sys.path[: 0 if safe else 1] = [entry]


def _hide_own_frames(error: BaseException) -> None:
    """Lets the traceback that the interpreter is going to print begin with the script's own code."""
    traceback = error.__traceback__
    while traceback and traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _OWN:
        traceback = traceback.tb_next
    excepthook = sys.excepthook

    def excepthook_without_own_frames(kind: type, value: BaseException, full: TracebackType | None) -> None:
        shown = traceback if value is error else full
        excepthook(kind, value.with_traceback(shown), shown)

    sys.excepthook = excepthook_without_own_frames


class _Registration:
    """Unpickled in a child process, registers there."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _register_here_and_in_children, ()


def _register_here_and_in_children() -> None:
    """Registers `adams` in this process and in those that it spawns; forked ones have inherited it.

    A spawned child (or one of a fork server) is given a dictionary before it imports the script: it takes from it what
    it knows and ignores other keys. Ours registers by being unpickled.
    """
    from ..registration import register

    register()
    get_preparation_data = spawn.get_preparation_data
    spawn.get_preparation_data = lambda name: {**get_preparation_data(name), "hf_swd": _Registration()}
