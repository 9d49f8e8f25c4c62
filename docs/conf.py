"""Sphinx: `sphinx-build -W docs build/docs`. The reference comes from the docstrings, which are in Markdown, as in
transformers."""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_swd  # noqa: E402


project = "hf-swd"
author = "the hf-swd authors"
copyright = "2026, the hf-swd authors, Apache-2.0"
release = version = hf_swd.__version__
html_title = f"hf-swd {version}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False


def _to_rst(app, what, name, obj, options, lines):
    text = "\n".join(lines)
    text = re.sub(
        r"^( *)```python\n(.*?)^\1```$",
        lambda match: f"{match[1]}.. code-block:: python\n\n" + re.sub(r"^(?=.)", "    ", match[2], flags=re.M),
        text,
        flags=re.M | re.S,
    )
    lines[:] = re.sub(r"\[`([\w.]+)`\]", r"`\1`", text).split("\n")


def _readme(app, docname, source):
    if docname == "readme":
        text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
        # What is linked outside of docs/ is not on the site.
        source[0] = re.sub(r"\[([^]]+)\]\((?:examples/[^)]*|[A-Z]+(?:\.\w+)?)\)", r"\1", text)


def setup(app):
    app.connect("source-read", _readme)
    app.connect("autodoc-process-docstring", _to_rst, priority=400)  # before napoleon
