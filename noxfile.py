"""The matrix: tests of one process and a training, of the built wheel, with other versions than scripts/test.sh has.

    nox -l                               # its environments
    nox -s oldest transformers-4.57      # a minute of installing each, where pip finds a build of torch without CUDA
    nox                                  # all of them: several GB each where it does not

Each Python must be on PATH. `-r` uses the environments again; arguments after `--` go to pytest, without the training.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import nox


nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

TRANSFORMERS = ["tests/trainer", "tests/commands", "tests/package"]
TORCH = ["tests/adams", "tests/schedule"]  # with the torch of constraints.txt, scripts/test.sh runs them


class Environment(NamedTuple):
    pythons: str | list[str]
    versions: str  # where they differ from those of scripts/constraints.txt
    extra: str = "test"  # "test-core": tests that need other packages are skipped
    packages: str = ""
    variables: dict[str, str] = {}


ENVIRONMENTS = {
    "oldest": Environment(
        "3.11",
        "transformers==4.46.3 accelerate==1.13.0 huggingface_hub==0.36.2 tokenizers==0.20.3",
        extra="test-core",
        # transformers before 4.47 cannot resume with torch 2.6 and later without it.
        variables={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    ),
    "transformers-4.57": Environment(
        "3.11",
        "transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 datasets==5.0.1",
        extra="test-core",  # the examples need transformers 5
        packages="peft trl",
    ),
    "middle": Environment(
        "3.11",
        "torch==2.9.1 transformers==5.10.4 accelerate==1.13.0 huggingface_hub==1.33.0 tokenizers==0.22.2"
        " torchao==0.14.1 peft==0.18.1",  # later torchao needs torch 2.11, and later peft later torchao
    ),
    "newest": Environment(
        ["3.10", "3.11", "3.12", "3.13"],
        # transformers 5.20 is the last for Python 3.10, as constraints.txt says.
        "torch==2.14.1 transformers==5.24.0;python_version>='3.11' transformers==5.20.2;python_version<'3.11'",
    ),
}


@functools.cache
def distributions() -> Path:
    """Folder of the wheel and the sdist: HF_SWD_DIST, or built and checked once for all environments."""
    if "HF_SWD_DIST" in os.environ:
        return Path(os.environ["HF_SWD_DIST"])
    folder = Path("build", "dist")
    subprocess.run(["bash", "scripts/package.sh", folder], check=True)
    return folder


def name_of(requirement: str) -> str:
    return re.split(r"[ =;]", requirement)[0]


def test(session: nox.Session) -> None:
    # A session's name is that of its environment, and of its Python if there are several.
    environment = ENVIRONMENTS[session.name.removesuffix(f"-{session.python}")]
    (wheel,) = distributions().glob("*.whl")
    (sdist,) = distributions().glob("*.tar.gz")
    temporary = Path(session.create_tmp())

    versions = environment.versions.split()
    pinned = Path("scripts/constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in pinned if name_of(line) not in map(name_of, versions)]
    constraints = temporary / "constraints.txt"
    constraints.write_text("\n".join([*kept, *versions]), encoding="utf-8")
    session.install("-c", str(constraints), "torch", "setuptools")
    session.install("-c", str(constraints), f"{wheel}[{environment.extra}]", *environment.packages.split())
    session.install("--force-reinstall", "--no-deps", str(wheel))  # in an environment that is used again, too

    # The tests of the sdist, without the package itself: so it is the wheel that they test.
    sources = temporary / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(sources, ignore_errors=True)
    shutil.unpack_archive(sdist, temporary)
    shutil.rmtree(sources / "hf_swd")
    variables = dict(environment.variables)
    if environment.extra == "test":
        variables["HF_SWD_TEST_COMPLETE"] = "1"
    tests = session.posargs or (TRANSFORMERS + TORCH if "torch" in map(name_of, versions) else TRANSFORMERS)
    with session.chdir(sources):
        session.run("python", "-c", "import hf_swd, sys; assert hf_swd.__file__.startswith(sys.prefix), hf_swd")
        session.run("pytest", "-n", "2", "--dist", "loadfile", *tests, env=variables)
        if not session.posargs:
            session.run("hf-swd", "run", "scripts/check_training.py", "--optim", "adams", "--output_dir", "outputs")


for name, environment in ENVIRONMENTS.items():
    nox.session(test, name=name, python=environment.pythons)
