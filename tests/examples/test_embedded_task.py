"""examples: the embedded task, its sentences and their splits."""

from __future__ import annotations

import ast
import os
from collections import Counter

import pytest


for name in ("datasets", "evaluate", "sklearn"):
    pytest.importorskip(name, reason="needs the extra: examples")
import embedded_task  # noqa: E402
import scoring  # noqa: E402


@pytest.fixture(scope="module")
def task():
    return embedded_task.build_embedded_task()


def test_embedded_task_has_thousands_of_distinct_sentences_in_balanced_classes(task):
    sentences = [*task["train"]["sentence"], *task["validation"]["sentence"]]
    assert len(sentences) >= 4000
    assert len(set(sentences)) == len(sentences)
    names = task["train"].features["label"].names
    assert names == list(embedded_task.LIBRARIES)
    for label in range(len(names)):
        in_train, in_validation = (Counter(task[split]["label"])[label] for split in ("train", "validation"))
        assert 500 <= in_train + in_validation <= 800, names[label]
        assert 0.19 < in_validation / (in_train + in_validation) < 0.25, names[label]


def test_embedded_task_splits_share_no_file_and_no_template(task):
    for column, key in (("source", str), ("sentence", embedded_task._opening)):
        parts = [{key(value) for value in task[split][column]} for split in ("train", "validation")]
        assert all(parts)
        assert parts[0].isdisjoint(parts[1])


def test_embedded_task_names_no_library(task):
    for sentence in [*task["train"]["sentence"], *task["validation"]["sentence"]]:
        lowered = sentence.lower()
        for name in (
            "numpy",
            "pandas",
            "python",
            "sklearn",
            "scikit",
            "torch",
            "transformers",
            "hugging",
            "np.",
            "pd.",
        ):
            start = lowered.find(name)
            # As part of a longer word ("nonpd.", "torchlike") a name gives nothing away.
            if start >= 0 and not lowered[start - 1 : start].isalpha():
                assert lowered[start + len(name) : start + len(name) + 1].isalpha(), sentence


def test_embedded_task_sentences_stand_in_the_sources(task):
    for row in [*task["validation"].select(range(0, 1000, 8)), *task["train"].select(range(0, 3000, 24))]:
        library, _, name = row["source"].partition("/")
        source = (embedded_task.source_folder(library) / name).read_text(encoding="utf-8")
        if row["sentence"] not in " ".join(source.split()):  # then it goes over adjacent string literals
            constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
            texts = [" ".join(text.split()) for text in constants if isinstance(text, str)]
            assert any(row["sentence"] in text for text in texts), row


def test_embedded_task_does_not_depend_on_the_order_of_the_file_system(monkeypatch):
    once = embedded_task.build_embedded_task(200)
    walk = os.walk

    def walk_backwards(top):
        for parent, subfolders, names in walk(top):
            subfolders.reverse()
            yield parent, subfolders, names[::-1]

    monkeypatch.setattr(os, "walk", walk_backwards)
    again = embedded_task.build_embedded_task(200)
    for split in ("train", "validation"):
        assert once[split].to_dict() == again[split].to_dict()


def test_embedded_task_without_a_library_has_one_class_less(monkeypatch):
    monkeypatch.setattr(embedded_task, "LIBRARIES", dict.fromkeys(("numpy", "pandas", "sklearn", "not_installed"), ()))
    with pytest.warns(UserWarning, match="not_installed: 0"):
        task = embedded_task.build_embedded_task(200)
    assert task["train"].features["label"].names == ["numpy", "pandas", "sklearn"]


def test_embedded_task_with_too_few_libraries_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded_task, "LIBRARIES", {"numpy": (), "not_installed": (), "nor_this": ()})
    with pytest.raises(RuntimeError, match=r"not_installed: 0.*pip install"):
        embedded_task.build_embedded_task(200)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sentences_per_library": 10}, "sentences_per_library=10"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ],
)
def test_embedded_task_with_a_wrong_argument_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedded_task.build_embedded_task(**arguments)


def test_documentation_is_read_without_running_the_file():
    source = '''"""Module text."""
raise SystemExit("must not run")
class A:
    """Class text."""
    def f(self):
        """Method text."""
add_newdoc("m", "f", """Added text.""")
topics = {"a": "Topic " "text."}
'''
    assert [text for text in embedded_task.documentation(source) if text] == [
        "Module text.", "Class text.", "Method text.", "m", "f", "Added text.", "Topic text.",
    ]  # fmt: skip


def test_sentences_are_prose_only():
    text = """Computes the sum of all the values, e.g. The values of a row, along an axis.  Short one.

    Parameters
    ----------
    x : int
        The number of the rows that are taken from the table at
        every step of the loop. See numpy for all the rest of what there is to know here.
    >>> Do not take this line of code for a sentence of prose.
    """
    assert list(embedded_task.sentences_of(text)) == [
        "Computes the sum of all the values, e.g. The values of a row, along an axis.",
        "The number of the rows that are taken from the table at every step of the loop.",
    ]


def test_majority_baseline_uses_the_most_frequent_training_label():
    assert scoring.majority_baseline([0, 1, 1, 2], [2, 2, 2, 1]) == 0.25
