"""The documents: their Python runs, their links lead somewhere, and the commands they show exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "examples").glob("*.md"))]
FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)
BLOCKS = [
    pytest.param(match["code"], id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, match in enumerate(FENCE.finditer(path.read_text(encoding="utf-8")))
    if "notest" not in match["options"]
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_the_documents_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_and_scripts_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for script in re.findall(r"\b((?:scripts|examples|tests)/[\w/.-]+\.(?:py|sh|yaml|json))\b", text):
        assert (ROOT / script).exists(), f"{path.name} names {script}"


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
