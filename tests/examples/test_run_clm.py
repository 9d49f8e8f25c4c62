"""examples/language_modeling/run_clm.py: run for real, on the embedded text and on files."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
datasets = pytest.importorskip("datasets", reason="needs the extra: examples")
import causal_model  # noqa: E402
import corpus  # noqa: E402
import embedded_text  # noqa: E402
import run_clm  # noqa: E402


TINY = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"


def settings(output_dir: Path, **changes) -> dict:
    """A run on the embedded text; a value of None takes an argument away."""
    common = {
        "embedded": True,
        "max_train_characters": 40_000,
        "vocab_size": 300,
        "config_overrides": TINY,
        "block_size": 32,
        "output_dir": str(output_dir),
        "do_train": True,
        "do_eval": True,
        "max_eval_samples": 40,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return {key: value for key, value in {**common, **changes}.items() if value is not None}


def run_here(arguments: dict, folder: Path, monkeypatch) -> None:
    """run_clm.main() in this process, with its arguments in a JSON file."""
    file = folder / "arguments.json"
    file.write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, "argv", ["run_clm.py", str(file)])
    run_clm.main()


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def history(folder: Path) -> list[dict]:
    return [entry for entry in read(folder, "trainer_state.json")["log_history"] if "loss" in entry]


def same_weights(one: Path, other: Path) -> None:
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=1e-6, atol=1e-8, msg=name)


def interrupted(run: Path, output_dir: Path) -> None:
    """An output folder with only the checkpoint of step 3, its log marked as no new training would have it."""
    shutil.copytree(run / "checkpoint-3", output_dir / "checkpoint-3")
    state = read(output_dir / "checkpoint-3", "trainer_state.json")
    state["log_history"][0]["loss"] = 123.0
    (output_dir / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def adams_run(tmp_path_factory) -> Path:
    """Output folder of `python examples/language_modeling/run_clm.py arguments.yaml` with adams."""
    folder = tmp_path_factory.mktemp("adams")
    # A JSON document is a YAML document.
    (folder / "arguments.yaml").write_text(
        json.dumps(settings(folder / "out", optim="adams", optim_args="reference_steps=2", log_level="info"))
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "language_modeling" / "run_clm.py"), str(folder / "arguments.yaml")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "out" / "stdout.txt").write_text(done.stdout)
    return folder / "out"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("".join(f"for number in range({n}):\n\tprint(number)\n\n" for n in range(300)), encoding="utf-8")
    return file


# --- from random weights ---


def test_run_clm_learns_and_logs_the_schedule(adams_run):
    logs = history(adams_run)
    assert len(logs) == 6
    assert logs[0]["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert logs[-1]["loss"] < logs[0]["loss"] - 1
    assert [entry["swd/weight_decay"] for entry in logs[:2]] == [0.01, 0.01]
    for entry in logs[2:]:
        assert entry["swd/weight_decay"] == pytest.approx(
            0.01 * logs[1]["swd/grad_rms"] / entry["swd/grad_rms"], rel=1e-5
        )
    assert "AdamS" in (adams_run / "stdout.txt").read_text().partition("Engine = ")[2].splitlines()[0]
    card = (adams_run / "README.md").read_text()
    assert "- hf_swd" in card and "ADAMS" in card and "Python's standard library" in card


def test_run_clm_evaluates_what_it_saved(adams_run):
    """Loss, perplexity and accuracy anew, from the saved model and tokenizer and the text itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(adams_run)
    tokenizer = AutoTokenizer.from_pretrained(adams_run)
    assert model.config.model_type == "llama" and len(tokenizer) == model.config.vocab_size == 300
    tokens = []
    for text in embedded_text.build_embedded_text()["validation"]["text"]:
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= 40 * 32:
            break
    blocks = torch.tensor(tokens[: 40 * 32]).view(40, 32)
    assert blocks[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    results = read(adams_run, "all_results.json")
    assert results["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-3)
    accuracy = (logits.argmax(-1) == blocks[:, 1:]).float().mean().item()
    assert results["eval_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert results["eval_samples"] == 40


def test_run_clm_goes_on_from_the_last_checkpoint(adams_run, tmp_path, monkeypatch, caplog):
    """Interrupted after step 3 and called again the same way, it ends with the weights of the uninterrupted run."""
    interrupted(adams_run, tmp_path / "out")
    run_here(settings(tmp_path / "out", optim="adams", optim_args="reference_steps=2"), tmp_path, monkeypatch)
    assert "checkpoint-3" in caplog.text
    same_weights(tmp_path / "out" / "model.safetensors", adams_run / "model.safetensors")
    logs, uninterrupted = history(tmp_path / "out"), history(adams_run)[-1]
    assert logs[0]["loss"] == 123 and len(logs) == 6
    assert logs[-1]["swd/weight_decay"] == pytest.approx(uninterrupted["swd/weight_decay"], rel=1e-6)


def test_run_clm_with_another_model_and_adamw(text_file, tmp_path, monkeypatch):
    arguments = settings(
        tmp_path / "out", embedded=None, train_file=str(text_file), validation_split_percentage=10, model_type="qwen3",
        vocab_size=257, optim="adamw_torch", max_train_characters=None, save_strategy="no",
    )  # fmt: skip
    run_here(arguments, tmp_path, monkeypatch)
    assert read(tmp_path / "out", "config.json")["model_type"] == "qwen3"
    logs = history(tmp_path / "out")
    assert logs[-1]["loss"] < logs[0]["loss"] - 1
    assert not [key for entry in logs for key in entry if key.startswith("swd/")]
    # Every byte is a token: the last 90 of 900 lines are the validation text.
    lines = text_file.read_text().splitlines(keepends=True)
    results = read(tmp_path / "out", "all_results.json")
    assert results["train_samples"] == sum(map(len, lines[:810])) // 32
    assert results["eval_samples"] == min(40, sum(map(len, lines[810:])) // 32)


# --- from a checkpoint ---


def checkpoint_settings(adams_run: Path, text_file: Path, output_dir: Path, **changes) -> dict:
    return settings(
        output_dir, model_name_or_path=str(adams_run), config_overrides=None, embedded=None,
        train_file=str(text_file), validation_file=str(text_file), max_train_characters=None, optim="adams",
        optim_args="reference_steps=2", **changes,
    )  # fmt: skip


def test_run_clm_trains_a_checkpoint_further(adams_run, text_file, tmp_path, monkeypatch):
    run_here(
        checkpoint_settings(adams_run, text_file, tmp_path / "out", save_strategy="no", dtype="bfloat16", bf16=True),
        tmp_path,
        monkeypatch,
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (adams_run / "tokenizer.json").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (adams_run, tmp_path / "out"))
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    changes = [(after[name].float() - weight).abs().max().item() for name, weight in before.items()]
    assert all(0 < change < 0.2 for change in changes), changes
    assert f"base_model: {adams_run}" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def lora_settings(adams_run, text_file, tmp_path_factory):
    pytest.importorskip("peft")

    def make(output_dir: Path) -> dict:
        return checkpoint_settings(
            adams_run, text_file, output_dir, lora_r=2, lora_alpha=8, lora_target_modules=["q_proj", "up_proj"],
            lora_dropout=0.1,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def lora_run(lora_settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(lora_settings(folder / "out"), folder, monkeypatch)
    return folder / "out"


def test_run_clm_with_lora_trains_and_saves_the_adapter_only(lora_run, adams_run):
    from peft import AutoPeftModelForCausalLM

    assert not (lora_run / "model.safetensors").exists()
    adapter = load_file(lora_run / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2  # A and B of two modules in two layers
    assert all(weight.any() for weight in adapter.values())  # B begins with zeros
    config = read(lora_run, "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8, 0.1)

    logs = history(lora_run)
    assert logs[-1]["loss"] < logs[0]["loss"]
    num_elements = sum(weight.numel() for weight in adapter.values())
    # The mean of the schedule is over the adapters: after one step it is that of their squared gradient.
    assert logs[0]["swd/grad_rms"] == pytest.approx(logs[0]["grad_norm"] / num_elements**0.5, rel=1e-4)
    base = AutoPeftModelForCausalLM.from_pretrained(lora_run).unload().state_dict()
    for name, weight in load_file(adams_run / "model.safetensors").items():
        assert torch.equal(base[name], weight), name


def test_run_clm_with_lora_goes_on_from_the_last_checkpoint(lora_run, lora_settings, tmp_path, monkeypatch):
    interrupted(lora_run, tmp_path / "out")
    run_here(lora_settings(tmp_path / "out"), tmp_path, monkeypatch)
    assert history(tmp_path / "out")[0]["loss"] == 123
    same_weights(tmp_path / "out" / "adapter_model.safetensors", lora_run / "adapter_model.safetensors")


def test_run_clm_with_lora_without_peft_says_what_to_install(adams_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="lora_r=4 needs PEFT: pip install peft"):
        causal_model.add_lora(torch.nn.Linear(2, 2), causal_model.LoraArguments(lora_r=4))


# --- text and tokens ---


def test_manual_does_not_share_chapters():
    data = embedded_text.build_embedded_text("manual")
    names, texts = ({split: set(part[column]) for split, part in data.items()} for column in ("source", "text"))
    assert names["train"].isdisjoint(names["validation"]) and texts["train"].isdisjoint(texts["validation"])
    assert "assert" in names["train"] | names["validation"]
    assert sum(map(len, texts.values())) == sum(map(len, data.values()))  # none is there twice, under two names


def test_embedded_text_does_not_share_files_and_is_the_same_everywhere(monkeypatch):
    data = embedded_text.build_embedded_text()
    names = {split: set(part["source"]) for split, part in data.items()}
    assert names["train"].isdisjoint(names["validation"])
    assert 0.05 < len(names["validation"]) / len(names["train"]) < 0.2
    assert "inspect.py" in names["train"] | names["validation"]
    assert not any(
        name.startswith(("test/", "encodings/", "_sysconfigdata")) for part in names.values() for name in part
    )
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda top: ((parent, folders, names[::-1]) for parent, folders, names in walk(top))
    )
    again = embedded_text.build_embedded_text()
    assert all(again[split].to_dict() == part.to_dict() for split, part in data.items())


def test_embedded_text_without_source_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded_text, "source_folder", lambda library: tmp_path)
    with pytest.raises(RuntimeError, match=r"0 characters of source files of Python's standard.*--train_file"):
        embedded_text.build_embedded_text()


def test_embedded_text_beside_another_source_is_refused():
    with pytest.raises(ValueError, match="embedded_text='manual' without --embedded would be ignored"):
        corpus.TextSource(train_file="text.txt", embedded_text="manual")


def test_unknown_embedded_text_in_a_file_of_arguments_is_named():
    with pytest.raises(ValueError, match="embedded_text='prose'; expected one of python, manual"):
        corpus.TextSource(embedded=True, embedded_text="prose")


def test_manual_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r"0 characters of chapters of Python's manual.*--train_file"):
        embedded_text.build_embedded_text("manual")


def test_tokenizer_is_the_same_however_many_threads_train_it():
    """Every rank, and every resumed run, must number the tokens in the same way."""
    program = (
        "import embedded_text, hashlib; texts = embedded_text.build_embedded_text()['validation']['text'];"
        "print(hashlib.sha256(embedded_text.train_tokenizer(texts, 1000).to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            cwd=ROOT / "examples" / "language_modeling",
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for threads in ("1", "4")
    }
    assert len(digests) == 1


def test_tokenizer_of_bytes_gives_the_text_back():
    text = "näïve\tcode  \r\n\x00 😀<|endoftext|>"
    tokenizer = embedded_text.wrap_tokenizer(embedded_text.train_tokenizer(["other"], 257))
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 257 and ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.removesuffix("<|endoftext|>").encode()) + 1
    assert tokenizer.decode(ids[1:]) == text
    with pytest.raises(ValueError, match="vocab_size=256; expected 257"):
        embedded_text.train_tokenizer(["other"], 256)


def bytes_tokenizer():
    return embedded_text.wrap_tokenizer(embedded_text.train_tokenizer(["text"], 257))


def test_blocks_of_a_text_file_are_the_file(text_file):
    source = corpus.TextSource(train_file=str(text_file), validation_split_percentage=10)
    tokenizer = bytes_tokenizer()
    data = corpus.load_text(source)
    tokens = corpus.tokenize(data["train"], tokenizer, source.rows_are_lines("train"))
    blocks = corpus.TokenBlocks(tokens["input_ids"], 64)
    whole = "".join(text_file.read_text().splitlines(keepends=True)[:810])
    assert tokenizer.decode(blocks.blocks.flatten().tolist()) == whole[: len(whole) // 64 * 64]
    assert len(blocks) == len(whole) // 64
    sample = blocks[3]
    assert torch.equal(sample["input_ids"], sample["labels"]) and sample["input_ids"].dtype == torch.int64
    assert tokenizer.decode(sample["input_ids"].tolist()) == whole[3 * 64 : 4 * 64]


def test_blocks_of_documents_run_on_over_their_beginnings(tmp_path):
    texts = ["first\n", "", "a second text", "third"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"number": 1, "text": text}) + "\n" for text in texts))
    source = corpus.TextSource(train_file=str(tmp_path / "texts.jsonl"), validation_file=str(tmp_path / "texts.jsonl"))
    tokenizer = bytes_tokenizer()
    data = corpus.load_text(source)
    tokens = corpus.tokenize(data["validation"], tokenizer, source.rows_are_lines("validation"))
    blocks = corpus.TokenBlocks(tokens["input_ids"], 7, max_blocks=3)
    assert [tokenizer.decode(block.tolist()) for block in blocks.blocks] == [
        "<|endoftext|>first\n", "<|endoftext|><|endoftext|>a sec", "ond tex",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="validation: 28 tokens do not fill one block of block_size=29"):
        corpus.TokenBlocks(tokens["input_ids"], 29, name="validation")


def test_first_characters_cut_the_last_text():
    part = datasets.Dataset.from_dict({"text": ["abc", "", "defg", "hij"]})
    assert list(corpus.first_characters(part, 5)["text"]) == ["abc", "", "de"]
    assert list(corpus.first_characters(part, 7)["text"]) == ["abc", "", "defg"]
    assert list(corpus.first_characters(part, 100)["text"]) == ["abc", "", "defg", "hij"]


# --- models ---


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"])
def test_models_from_random_weights_are_small(model_type):
    tokenizer = bytes_tokenizer()
    model = causal_model.load_model(None, tokenizer, model_type=model_type, overrides="num_attention_heads=2")
    config = model.config
    assert (config.num_attention_heads, config.hidden_size, config.vocab_size) == (2, 128, 257)
    assert config.bos_token_id == tokenizer.bos_token_id
    assert model.num_parameters() < 12 * 128**2 * config.num_hidden_layers + 1400 * 128
    tokens = torch.arange(16).view(1, 16)
    assert torch.isfinite(model(input_ids=tokens, labels=tokens).loss)


def test_config_overrides_reach_what_depends_on_them():
    config = causal_model.small_config("llama", "hidden_size=96,num_attention_heads=6", bytes_tokenizer())
    assert (config.head_dim, config.num_key_value_heads) == (16, 6)
    config = causal_model.small_config("qwen3", "num_key_value_heads=2,head_dim=8", bytes_tokenizer())
    assert (config.head_dim, config.num_key_value_heads, config.num_attention_heads) == (8, 2, 4)


@pytest.mark.parametrize(
    "model_type, overrides, message",
    [
        ("llama", "hiden_size=64", "config_overrides='hiden_size=64'.*expected settings of LlamaConfig"),
        ("llama", "hidden_size=tall", "config_overrides='hidden_size=tall'"),
        ("llama", "hidden_size=100,num_attention_heads=3", "hidden_size=100 must be a multiple of num_att"),
        ("vit", None, "model_type='vit' is no causal language model"),
        ("lama", None, "model_type='lama' is no causal language model"),
    ],
)
def test_config_with_a_wrong_value_names_it(model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        causal_model.small_config(model_type, overrides, bytes_tokenizer())


def test_block_size_is_within_what_the_model_takes():
    assert causal_model.choose_block_size(None, longest=512) == 512
    assert causal_model.choose_block_size(None, longest=10**30) == 1024
    assert causal_model.choose_block_size(300, longest=512) == 300
    with pytest.raises(ValueError, match="block_size=513; expected 2 to 512"):
        causal_model.choose_block_size(513, longest=512)
    with pytest.raises(ValueError, match="block_size=1; expected 2"):
        causal_model.choose_block_size(1, longest=512)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedded": None}, "exactly one source"),
        ({"train_file": "a.txt"}, "train_file='a.txt'.*embedded=True; expected exactly one source"),
        ({"embedded": None, "validation_file": "a.txt"}, "validation_file='a.txt'.*exactly one source"),
        ({"embedded": None, "train_file": "a.pdf"}, r"train_file='a.pdf'; expected a file that ends in \.txt"),
        ({"embedded": None, "train_file": "missing.txt"}, "train_file='missing.txt'; there is no such file"),
        ({"max_train_characters": 0}, "max_train_characters=0"),
        ({"max_eval_samples": 0}, "max_eval_samples=0"),
        ({"validation_split_percentage": 100}, "validation_split_percentage=100"),
        ({"block_size": 2000}, "block_size=2000; expected 2 to 1024"),
        ({"max_train_characters": 20}, "train: .* do not fill one block of block_size=32"),
        ({"model_name_or_path": "x"}, "config_overrides='hidden_size.*model_name_or_path='x'"),
        ({"lora_r": 4}, "lora_r=4 without model_name_or_path"),
        ({"lora_r": 0}, "lora_r=0"),
    ],
)
def test_wrong_arguments_are_named(changes, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run_here(settings(tmp_path / "out", **changes), tmp_path, monkeypatch)


def test_text_files_that_hold_no_text_are_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "line.txt").write_text("one line")
    (tmp_path / "numbers.csv").write_text("number,word\n1,one\n2,two\n")
    with pytest.raises(ValueError, match="empty.txt' is empty"):
        corpus.load_text(corpus.TextSource(train_file=str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match="1 rows of text cannot be divided"):
        corpus.load_text(corpus.TextSource(train_file=str(tmp_path / "line.txt")))
    with pytest.raises(ValueError, match="the column 'number' holds Value.*not texts; the columns are number, word"):
        corpus.load_text(corpus.TextSource(train_file=str(tmp_path / "numbers.csv")))
    with pytest.raises(ValueError, match="text_column_name='words' is not among the columns number, word"):
        corpus.load_text(corpus.TextSource(train_file=str(tmp_path / "numbers.csv"), text_column_name="words"))


def test_a_tokenizer_with_more_tokens_than_the_checkpoint_is_refused(adams_run, tmp_path):
    embedded_text.wrap_tokenizer(embedded_text.train_tokenizer(["text " * 9], 301)).save_pretrained(tmp_path)
    tokenizer = causal_model.load_tokenizer(None, ["abc abd abe " * 9] + [chr(300 + n) * 9 for n in range(99)], 310)
    assert len(tokenizer) == 310
    with pytest.raises(ValueError, match="tokenizer has 310 tokens, and .* knows 300"):
        causal_model.load_model(str(adams_run), tokenizer)


def test_layers_that_the_config_names_are_replaced_if_the_model_has_none(caplog):
    from types import SimpleNamespace

    import engine_in_use

    model = causal_model.load_model(None, bytes_tokenizer(), overrides=TINY)

    def named(*classes):
        plugin = SimpleNamespace(transformer_cls_names_to_wrap=list(classes) or None)
        state = SimpleNamespace(fsdp_plugin=plugin)
        engine_in_use.wrap_own_layers(SimpleNamespace(model=model, accelerator=SimpleNamespace(state=state)))
        return plugin.transformer_cls_names_to_wrap

    with caplog.at_level(logging.WARNING):
        assert named("LlamaDecoderLayer") == ["LlamaDecoderLayer"]
        assert named() is None
        assert not caplog.records
        assert named("BertLayer") is None
    assert "The model has no BertLayer" in caplog.text
    state = SimpleNamespace()  # not FSDP
    engine_in_use.wrap_own_layers(SimpleNamespace(model=model, accelerator=SimpleNamespace(state=state)))
