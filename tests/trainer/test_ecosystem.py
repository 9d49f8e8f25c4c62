"""optim="adams" beside what else a Trainer does: PEFT, checkpointed activations, bf16, searches, best models."""

from __future__ import annotations

import json

import pytest
import torch
from hf_utils import arguments, sentences, tiny_bert
from transformers import Trainer

import hf_swd
from hf_swd import AdamS, ScheduledWeightDecay, SWDTrainer


def trained(tmp_path, model=None, trainer_class=Trainer, trainer_kwargs=None, **changes):
    model = tiny_bert() if model is None else model
    trainer = trainer_class(model, arguments(tmp_path, **changes), train_dataset=sentences(), **(trainer_kwargs or {}))
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def rms_of_moments(optimizer: AdamS) -> float:
    """Root of the mean of the bias-corrected second moments, taken literally."""
    states = optimizer.state.values()
    total = sum((s["exp_avg_sq"].double().sum() / (1 - 0.999 ** s["step"].item())).item() for s in states)
    return (total / sum(s["exp_avg_sq"].numel() for s in states)) ** 0.5


def adams_of(trainer) -> AdamS:
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AdamS
    return optimizer


@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
def test_lora_trains_the_adapters_and_averages_over_them(tmp_path, trainer_class):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny_bert(), config)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = trained(tmp_path, model, trainer_class)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = adams_of(trainer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in trainable}
    assert set(optimizer.state) == set(trainable)
    assert optimizer.grad_rms == pytest.approx(rms_of_moments(optimizer), rel=1e-4)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_checkpointed_activations_change_nothing(tmp_path):
    def run(checkpointing):
        return weights(trained(tmp_path, without_dropout(tiny_bert()), gradient_checkpointing=checkpointing))

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


def test_bf16_autocast_keeps_float32_moments_and_logs_the_schedule(tmp_path):
    trainer = trained(tmp_path, bf16=True, use_cpu=True)
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in adams_of(trainer).state.values())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6 and all(entry["swd/grad_rms"] > 0 for entry in logs)


@pytest.mark.slow
def test_compiled_model_trains_as_the_eager_one(tmp_path):
    def run(compile_):
        return weights(trained(tmp_path, without_dropout(tiny_bert()), torch_compile=compile_))

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "foreach", "scheduled_adamw"])
def test_steps_in_a_compiled_function_are_the_eager_ones(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(compile_):
        params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(3, 2))]
        options = {"lr": 1e-2, "weight_decay": 1e-2}
        if kind == "scheduled_adamw":
            optimizer = torch.optim.AdamW(params, fused=True, **options)
            clipper = ScheduledWeightDecay(optimizer)
        else:
            optimizer = clipper = AdamS(params, foreach=kind == "foreach", fused=kind == "fused", **options)

        def clip_and_step():
            clipper.clip_grad_norm_(1.0)
            optimizer.step()

        step = compile_(clip_and_step)
        for i in range(3):
            for j, p in enumerate(params):
                p.grad = torch.full_like(p, (i + 1) / (j + 1))
            step()
        return torch.nn.utils.parameters_to_vector(params)

    compiled = run(lambda step: torch.compile(step, backend=backend))
    torch.testing.assert_close(compiled, run(lambda step: step), rtol=0, atol=0)
    # Of AdamS nothing is compiled, of ScheduledWeightDecay only the step of the other optimizer.
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    assert kind == "scheduled_adamw" or not calls


@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
def test_smaller_batches_after_running_out_of_memory_leave_the_schedule_in_step(tmp_path, trainer_class):
    """auto_find_batch_size goes on with the same model and optimizer; the step that failed counts for neither."""
    tries = []

    class OutOfMemory(trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            size = len(inputs["input_ids"])
            if size > 4 and self.state.global_step == 2:
                tries.append(size)
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = trained(tmp_path, trainer_class=OutOfMemory, auto_find_batch_size=True)
    assert tries and trainer.state.global_step == 6
    optimizer = adams_of(trainer)
    assert {state["step"].item() for state in optimizer.state.values()} == {optimizer.schedule.step_count}
    assert optimizer.grad_rms == pytest.approx(rms_of_moments(optimizer), rel=1e-4)


def test_hyperparameter_search_over_weight_decay(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    class Recording(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            seen.append(max(group["initial_weight_decay"] for group in self.optimizer.param_groups))
            return optimizer

    trainer = Recording(
        args=arguments(tmp_path, eval_strategy="no"),
        train_dataset=sentences(),
        eval_dataset=sentences(16),
        model_init=lambda: tiny_bert(),
    )
    best = trainer.hyperparameter_search(
        backend="optuna",
        n_trials=3,
        direction="minimize",
        hp_space=lambda trial: {"weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True)},
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert len(set(seen)) == 3 and best.hyperparameters["weight_decay"] in seen


def test_model_init_starts_every_training_anew(tmp_path):
    trainer = Trainer(args=arguments(tmp_path), train_dataset=sentences(), model_init=lambda: tiny_bert())
    results = []
    for _ in range(2):
        trainer.train()
        results.append((weights(trainer), adams_of(trainer).grad_rms))
    torch.testing.assert_close(results[0], results[1])


def test_best_model_is_loaded_at_the_end(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(
        tmp_path,
        trainer_kwargs={"eval_dataset": sentences(16)},
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        **changes,
    )
    assert trainer.state.best_model_checkpoint is not None
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_wandb_offline_gets_the_schedule(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    trained(tmp_path, report_to="wandb", trainer_kwargs={"callbacks": [KeepLogs(wandb, logged)]})
    assert any("train/swd/weight_decay" in keys and "train/swd/grad_rms" in keys for keys in logged)
    assert list(tmp_path.glob("wandb/offline-run-*"))


class KeepLogs(hf_swd.SWDCallback):
    """Reads back, at the end, what the run of W&B holds."""

    def __init__(self, wandb, logged):
        self.wandb, self.logged = wandb, logged

    def on_train_end(self, args, state, control, **kwargs):
        self.logged.append(json.loads(json.dumps([str(key) for key in self.wandb.run.summary.keys()])))
