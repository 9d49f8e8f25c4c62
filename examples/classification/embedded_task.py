"""A real sentence-classification task without a download: which library does a sentence of documentation come from?

The sentences are read, each time the task is built, from the docstrings in the source files of installed packages. The
files are parsed and never run, and no sentence is stored in this repository. A sentence that names one of the
libraries is left out, so that its content has to tell. Train and validation share no file, no sentence and no sentence
opening.

    python examples/classification/embedded_task.py        # sizes, majority baseline, some sentences
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING


sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from installed_sources import source_files, source_folder, stable_hash


if TYPE_CHECKING:
    from datasets import DatasetDict


# Class (its import name; "python" is the standard library) -> further words that give it away.
LIBRARIES = {
    "numpy": ("np",),
    "pandas": ("pd",),
    "python": ("cpython", "pep", "peps", "stdlib"),
    "sklearn": ("scikit", "scikits"),
    "torch": ("pytorch", "libtorch", "torchscript", "torchvision", "torchaudio"),
    "transformers": ("transformer", "huggingface", "hugging", "hf"),
}
MIN_SENTENCES_PER_LIBRARY = 200
MIN_LIBRARIES = 3
MAX_FILES_PER_LIBRARY = 600
MAX_SENTENCES_PER_FILE = 25

_NAMES = [*LIBRARIES, *(name for names in LIBRARIES.values() for name in names)]
_GIVES_AWAY = re.compile(rf"(?<![a-z])(?:{'|'.join(_NAMES)})(?![a-z])", re.IGNORECASE)
# A docstring falls into blocks at blank lines, at underlines of headings, and where the indentation changes.
_HEADING_LINE = re.compile(r"\s*[-=~^*#]{3,}\s*")
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!cf\.)(?<!al\.)(?<!etc\.)(?<=[.!?])\s+(?=[A-Z`\"'(])")
# Prose from capital to full stop; colons, braces, equals signs and the like mean markup, parameter lists or code.
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;'\"()`/.*_-]*[A-Za-z)`]\.")
_NUM_WORDS = range(8, 41)


def documentation(source: str) -> Iterator[str]:
    """Yields the documentation texts of a Python source file.

    Docstrings; texts handed to add_docstr or add_newdoc (how compiled functions get theirs); the values of literal
    dictionaries of texts (how `pydoc_data.topics` keeps the language reference).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in other people's files
        pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        texts: list[ast.expr] = []
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            if getattr(function, "id", getattr(function, "attr", "")).endswith(("add_docstr", "add_newdoc")):
                texts = node.value.args
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = node.value.values
        for text in texts:
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.If, ast.Try)
        ):  # function bodies hold next to no documentation
            pending += reversed(node.body)


def _blocks(text: str) -> Iterator[str]:
    block: list[str] = []
    indentation = 0
    for line in [*text.expandtabs().splitlines(), ""]:
        indented = len(line) - len(line.lstrip())
        if block and (not line.strip() or indented != indentation or _HEADING_LINE.fullmatch(line)):
            yield " ".join(block)
            block = []
        if line.strip() and not _HEADING_LINE.fullmatch(line):
            block.append(" ".join(line.split()))
            indentation = indented


def sentences_of(text: str) -> Iterator[str]:
    """Yields the sentences of a text, verbatim but for white space, that are prose and name no library."""
    for block in _blocks(text):
        for sentence in _SENTENCE_END.split(block):
            num_words = len(re.findall(r"[A-Za-z]{2,}", sentence))
            if num_words in _NUM_WORDS and _PROSE.fullmatch(sentence) and not _GIVES_AWAY.search(sentence):
                yield sentence


def _opening(sentence: str) -> str:
    """First six words: sentences made from one template ("Returns the number of ...") count as one."""
    return " ".join(re.findall(r"[a-z]+", sentence.lower())[:6])


def _library_sentences(library: str, num_sentences: int) -> dict[str, tuple[str, str]]:
    """Opening -> (sentence, file) of at least `num_sentences` sentences if the library has them, file by file."""
    found: dict[str, tuple[str, str]] = {}
    folder = source_folder(library)
    for name, path in source_files(folder)[:MAX_FILES_PER_LIBRARY] if folder else ():
        if len(found) >= num_sentences:
            break
        try:
            sentences = [s for text in documentation(path.read_text(encoding="utf-8")) for s in sentences_of(text)]
        except (OSError, SyntaxError, ValueError):  # unreadable, or not Python of this version: another file will do
            continue
        new = {_opening(s): (s, f"{library}/{name}") for s in reversed(sentences) if _opening(s) not in found}
        found.update((opening, new[opening]) for opening in sorted(new, key=stable_hash)[:MAX_SENTENCES_PER_FILE])
    return found


def build_embedded_task(sentences_per_library: int = 800, validation_fraction: float = 0.2) -> DatasetDict:
    """Builds the task from the packages that are installed.

    Args:
        sentences_per_library (`int`, *optional*, defaults to 800): most sentences of one class, 200 or more.
        validation_fraction (`float`, *optional*, defaults to 0.2): share of each class in the validation split,
            in (0, 1); whole files go there until it is reached.

    Returns:
        `DatasetDict` with splits `train` and `validation` and columns `sentence`, `label` (class names in its feature)
        and `source` (library/file). The same rows in the same order wherever the same versions are installed.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: too few of the libraries, or of their source files, are installed.
    """
    if sentences_per_library < MIN_SENTENCES_PER_LIBRARY:
        raise ValueError(f"{sentences_per_library=}; expected at least {MIN_SENTENCES_PER_LIBRARY}.")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"{validation_fraction=}; expected a number between 0 and 1.")
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    # Some more than wanted, since an opening that occurs in two classes is taken out of both.
    found = {library: _library_sentences(library, sentences_per_library + 50) for library in LIBRARIES}
    num_libraries = Counter(opening for sentences in found.values() for opening in sentences)
    kept = {
        library: [pair for opening, pair in sentences.items() if num_libraries[opening] == 1][:sentences_per_library]
        for library, sentences in found.items()
    }
    classes = [library for library in LIBRARIES if len(kept[library]) >= MIN_SENTENCES_PER_LIBRARY]
    if len(classes) < len(LIBRARIES):
        counts = ", ".join(f"{library}: {len(kept[library])}" for library in LIBRARIES)
        message = (
            f"embedded task: sentences found: {counts}; a class needs {MIN_SENTENCES_PER_LIBRARY}. "
            'Install the libraries, with their source files, by: pip install -e ".[examples]"'
        )
        if len(classes) < MIN_LIBRARIES:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)

    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    for label, library in enumerate(classes):
        pairs = kept[library]
        num_validation = round(validation_fraction * len(pairs))
        held_out: set[str] = set()
        for position, (_, source) in enumerate(pairs):
            if position < num_validation:
                held_out.add(source)
        for sentence, source in pairs:
            split = "validation" if source in held_out else "train"
            rows[split].append({"sentence": sentence, "label": label, "source": source})
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=classes), "source": Value("string")})
    return DatasetDict(
        {
            split: Dataset.from_list(sorted(part, key=lambda row: stable_hash(row["sentence"])), features=features)
            for split, part in rows.items()
        }
    )


def main() -> None:
    from scoring import majority_baseline

    task = build_embedded_task()
    names = task["train"].features["label"].names
    for split, part in task.items():
        counts = Counter(part["label"])
        print(
            f"{split}: {len(part)} sentences:",
            ", ".join(f"{names[label]} {counts[label]}" for label in sorted(counts)),
        )
    print(f"majority baseline: {majority_baseline(task['train']['label'], task['validation']['label']):.4f}")
    for row in task["validation"].select(range(12)):
        print(f"  {names[row['label']]:12} {row['sentence']}")


if __name__ == "__main__":
    main()
