"""A script that knows nothing of hf_swd until it has trained: the launcher gives its Trainer `--optim adams`.

    hf-swd run scripts/check_training.py --optim adams --output_dir outputs/check

Trains a small BERT with the stock Trainer on real text, the metadata of installed packages, and compares the weights
with those of a loop by hand. For any transformers that hf_swd works with; seconds on a CPU.
"""

from __future__ import annotations

import copy
import re
import sys
import zlib
from importlib.metadata import distribution

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)


PACKAGES = ("torch", "transformers")
LENGTH, VOCABULARY, STEPS, BATCH = 16, 2000, 60, 16
REFERENCE_STEPS = 10


class Lines(torch.utils.data.IterableDataset):
    """Pieces of LENGTH words, over and over, in one order; the label is the package that they are from."""

    def __init__(self) -> None:
        pieces = []
        for label, package in enumerate(PACKAGES):
            words = re.findall(r"[a-z]+", (distribution(package).read_text("METADATA") or "").lower())
            ids = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words if word not in PACKAGES]
            pieces.append([(ids[i : i + LENGTH], label) for i in range(0, len(ids) - LENGTH, LENGTH)])
        self.pieces = [piece for pair in zip(*pieces, strict=False) for piece in pair]

    def __iter__(self):
        while True:
            for ids, label in self.pieces:
                yield {"input_ids": torch.tensor(ids), "labels": label}


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        weight_decay=0.1,
        optim_args=f"reference_steps={REFERENCE_STEPS}",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    untrained, by_hand = flat(model), copy.deepcopy(model)
    trainer = Trainer(model, args, train_dataset=Lines())
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    decays = [entry["swd/weight_decay"] for entry in logs]
    assert len(decays) == STEPS and decays[0] == args.weight_decay, decays
    assert abs(decays[-1] / args.weight_decay - 1) > 0.01, f"the decay was not scheduled: {decays}"
    losses = [sum(entry["loss"] for entry in part) / 10 for part in (logs[:10], logs[-10:])]
    assert losses[1] < 0.9 * losses[0], f"the loss was {losses[0]:.3f}, and {losses[1]:.3f} at the end"

    from hf_swd import create_adams

    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "reference_steps": REFERENCE_STEPS}
    optimizer = create_adams(by_hand, **options)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    batches = iter(torch.utils.data.DataLoader(Lines(), BATCH))
    by_hand.train()
    for _ in range(STEPS):
        by_hand(**next(batches)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    difference = ((flat(model) - flat(by_hand)).norm() / (flat(model) - untrained).norm()).item()
    assert difference < 1e-5, f"Trainer and loop differ by {difference:.1e} of the distance travelled"
    print(
        f"loss {losses[0]:.3f} -> {losses[1]:.3f}, decay {decays[0]:.3g} -> {decays[-1]:.3g}, "
        f"difference from the loop by hand {difference:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
