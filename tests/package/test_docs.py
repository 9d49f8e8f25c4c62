"""The documents: their Python runs, their links lead somewhere, and the scripts take the arguments that they show."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_swd


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(hf_swd.__file__).parents[1]  # the tests of a wheel stand in a folder without it
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)
BLOCKS = [
    pytest.param(match["code"], id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, match in enumerate(FENCE.finditer(path.read_text(encoding="utf-8")))
    if match["language"] == "python"
]


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(where it stands, path of the example, its arguments) of the documents and of the examples' own docstrings."""
    texts = {
        path.name: "\n".join(
            m["code"] for m in FENCE.finditer(path.read_text(encoding="utf-8")) if m["language"] == "bash"
        )
        for path in DOCUMENTS
    }
    for path in sorted((ROOT / "examples").glob("*/*.py")):
        texts[path.name] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for place, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*python examples/([\w/]+)\.py (-.*)", line)
            if match and "..." not in line:
                yield place, match[1], shlex.split(match[2], comments=True)


COMMANDS = [pytest.param(*command, id=f"{command[0]}-{i}") for i, command in enumerate(commands())]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_the_documents_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_and_scripts_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for script in re.findall(r"\b((?:hf_swd|scripts|examples|tests)/[\w/.-]+\.(?:py|sh|yaml|json))\b", text):
        root = PACKAGE if script.startswith("hf_swd/") else ROOT
        assert (root / script).exists(), f"{path.name} names {script}"


@pytest.mark.parametrize(("place", "example", "arguments"), COMMANDS)
def test_examples_take_the_arguments_that_are_shown(place, example, arguments, tmp_path, monkeypatch):
    for package in ("datasets", "evaluate", "sklearn", "PIL"):
        pytest.importorskip(package, reason="needs the extra: examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *arguments])
    for folder in ("train", "validation"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
    module = importlib.import_module(Path(example).name)
    if hasattr(module, "TrainingArguments"):
        module.parse_arguments((module.ModelArguments, module.DataTrainingArguments, module.TrainingArguments))
    else:
        getattr(module, "parse_arguments", getattr(module, "parse_args", None))()


def test_there_are_blocks_and_commands():
    assert len(BLOCKS) >= 3 and len(COMMANDS) >= 10
