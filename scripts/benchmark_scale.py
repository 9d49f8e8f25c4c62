#!/usr/bin/env python
"""Time of one optimizer step of one rank of thousands, and its collectives: AdamS beside fused AdamW on Llamas of 1 B
to 405 B parameters under FSDP2, HSDP and FSDP2 x TP.

    python scripts/benchmark_scale.py --threads 1              # 6 minutes of CPU time, 4.3 GB
    python scripts/benchmark_scale.py --models 70B --ranks 1024 --engines FSDP2

Torch's fake process group stands for the other ranks: a collective returns at once, so the time is this rank's own
work (Python's, the dispatcher's, the kernels'), and collectives are counted with their bytes; what they cost on a
network is docs/benchmarks/collectives.md. The model is built without memory and sharded as for training; then only the
shards of rank 0 are allocated, with random weights and gradients. Combinations with larger shards than
--max_local_elements are left out. Writes NAME.json, NAME.md and (with matplotlib) NAME.png into --output_dir.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchmark_tools import (  # noqa: E402
    ADAMS_COLOUR,
    ADAMW_COLOUR,
    DECAY,
    LR,
    MAX_NORM,
    machine,
    rows_of,
    share_moments,
    time_in_turn,
    timed,
    write_report,
)
from sharded_llama import ENGINES, MODELS, TP, allocated, build, local_elements, rank_0_of  # noqa: E402

from hf_swd import AdamS  # noqa: E402


CPU = torch.device("cpu")
BASELINE, ADAMS = "AdamW", "AdamS"
WHATS = {"step": "step", "clip": "clipping + step"}


# What is measured


class Collectives(CommDebugMode):
    """Bytes of the tensors of every collective, in order; what is a collective is for `CommDebugMode` to say."""

    def __enter__(self) -> Collectives:
        self.sizes: list[int] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = self.get_total_counts()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > seen:
            self.sizes.append(sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)))
        return result


def contenders(params: list[Parameter]) -> dict[str, dict[str, Callable[[], object]]]:
    """A step of each optimizer, as a loop and as a Trainer make it with clipping; the moments belong to both."""
    adamw = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    adams = AdamS(params, lr=LR, weight_decay=DECAY)
    clipping_adams = AdamS(params, lr=LR, weight_decay=DECAY, max_grad_norm=MAX_NORM)
    share_moments([adamw, adams, clipping_adams], params)

    def clip_and_step_adamw() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        adamw.step()

    return {
        "step": {BASELINE: adamw.step, ADAMS: adams.step},
        "clip": {BASELINE: clip_and_step_adamw, ADAMS: clipping_adams.step},
    }


def collectives(functions: dict[str, Callable[[], object]]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Bytes of the collectives of each function, and of those that do not run the first line of their error."""
    sizes, errors = {}, {}
    for name, function in functions.items():
        try:
            function()  # AdamS's first step sums the moments that it takes over: one collective more
            with Collectives() as seen:
                function()
            sizes[name] = seen.sizes
        except RuntimeError as error:  # torch's clipping, of parameters on several meshes
            if name != BASELINE:
                raise
            errors[name] = str(error).splitlines()[0]
    return sizes, errors


def measure(
    engine: str,
    model_name: str,
    config: LlamaConfig,
    ranks: int,
    *,
    max_local_elements: int,
    repetitions: int,
    seconds: float = 0,
) -> list[dict]:
    """Rows of one combination, repeated for so many seconds, but at least `repetitions` times; a single row that says
    why if it is left out."""
    with rank_0_of(ranks):
        model = build(config)
        common = {
            "engine": engine,
            "model": model_name,
            "ranks": ranks,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tensors": sum(1 for _ in model.parameters()),
        }
        ENGINES[engine](model, ranks)
        common["local_elements"] = local_elements(model)
        if common["local_elements"] > max_local_elements:
            return [{**common, "left_out": f"more than {max_local_elements / 1e6:.0f} M elements per rank"}]
        params = allocated(model)
        rows = []
        for what, functions in contenders(params).items():

            def above_the_largest_norm(what: str = what) -> None:
                if what == "clip":  # again, whoever clipped last
                    torch._foreach_mul_([p.grad.to_local() for p in params], 2.0)

            sizes, errors = collectives(functions)
            runs = {name: functions[name] for name in sizes}
            above_the_largest_norm()
            once = 1e-3 * timed(lambda runs=runs: [function() for function in runs.values()])
            times = time_in_turn(runs, max(repetitions, round(seconds / once)), above_the_largest_norm)
            rows += [
                {**row, "collectives": sizes[row["contender"]]}
                for row in rows_of(times, BASELINE, **common, what=what)
            ]
            rows += [{**common, "what": what, "contender": name, "error": error} for name, error in errors.items()]
    return rows


# What is written


def found(rows: list[dict], **keys: object) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in keys.items())]


def collectives_of(row: dict) -> str:
    if "error" in row:
        return "stops"
    sizes = row["collectives"]
    return f"{len(sizes)} ({' + '.join(f'{size:,}' for size in sizes)} B)" if sizes else "0"


def cells(adamw: dict, adams: dict) -> str:
    """Times of both, and their ratio."""
    if "error" in adamw:
        return f"stops | {adams['median_ms']:.1f} | "
    return f"{adamw['median_ms']:.1f} | {adams['median_ms']:.1f} | {adams['ratio_to_fused_adamw']:.2f}"


def summary(rows: list[dict]) -> list[str]:
    """Of every engine, the ratios and the numbers of collectives."""
    lines = [
        f"| times {BASELINE}: median of the combinations (smallest to largest) | step | clipping + step "
        f"| collectives of a step: {BASELINE} / {ADAMS} | with clipping: {BASELINE} / {ADAMS} |",
        "|---|---:|---:|---:|---:|",
    ]
    for engine in dict.fromkeys(row["engine"] for row in rows if "left_out" not in row):
        ratios, counts = [], []
        for what in WHATS:
            mine = found(rows, engine=engine, what=what, contender=ADAMS)
            values = [row["ratio_to_fused_adamw"] for row in mine if "ratio_to_fused_adamw" in row]
            spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""
            ratios.append(spread or "stops")
            both = (found(rows, engine=engine, what=what, contender=name) for name in (BASELINE, ADAMS))
            counts.append(
                " / ".join(
                    ", ".join(map(str, sorted({len(row["collectives"]) for row in group if "collectives" in row})))
                    or "stops"
                    for group in both
                )
            )
        lines.append(f"| {engine} | {' | '.join([*ratios, *counts])} |")
    return lines


def table(rows: list[dict]) -> list[str]:
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        members = found(rows, engine=engine)
        lines += ["", f"## {engine}", ""]
        lines += [
            f"| model | ranks | tensors | elements here, M | step: {BASELINE}, ms | {ADAMS}, ms | times {BASELINE} "
            f"| clipping + step: {BASELINE}, ms | {ADAMS}, ms | times {BASELINE} "
            f"| collectives of a step: {BASELINE} / {ADAMS} | with clipping: {BASELINE} / {ADAMS} |",
            "|---|" + "---:|" * 11,
        ]
        for case in dict.fromkeys((row["model"], row["ranks"]) for row in members if "left_out" not in row):
            of_case = found(members, model=case[0], ranks=case[1])
            pairs = [
                tuple(found(of_case, what=what, contender=name)[0] for name in (BASELINE, ADAMS)) for what in WHATS
            ]
            size = f"{of_case[0]['tensors']} | {of_case[0]['local_elements'] / 1e6:.1f}"
            times = " | ".join(cells(*pair) for pair in pairs)
            counts = " | ".join(" / ".join(map(collectives_of, pair)) for pair in pairs)
            lines.append(f"| {case[0]} | {case[1]} | {size} | {times} | {counts} |")
        for row in [row for row in members if "error" in row][:1]:
            lines += ["", f'"stops": `torch.nn.utils.clip_grad_norm_` raises `{row["error"]}`']
        left_out = [row for row in members if "left_out" in row]
        if left_out:
            cases = [f"{row['model']} on {row['ranks']} ({row['local_elements'] / 1e6:,.0f} M)" for row in left_out]
            lines += ["", f"Left out, {left_out[0]['left_out']}: {', '.join(cases)}."]
    return lines


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["model"], row["ranks"]) for row in rows if "median_ms" in row))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, axes = plt.subplots(
        len(engines),
        2,
        figsize=(13, 1 + 2.6 * len(engines)),
        squeeze=False,
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    colors = {
        ("step", BASELINE): "#EAAE80",  # half of ADAMW_COLOUR
        ("step", ADAMS): "#80B8D8",
        ("clip", BASELINE): ADAMW_COLOUR,
        ("clip", ADAMS): ADAMS_COLOUR,
    }
    for (left, right), engine in zip(axes, engines, strict=True):
        right.axhline(1, color="black", linewidth=0.8, zorder=0)
        for i, ((what, name), color) in enumerate(colors.items()):
            bars = {
                cases.index((row["model"], row["ranks"])): row
                for row in found(rows, engine=engine, what=what, contender=name)
                if "median_ms" in row
            }
            at = [place + 0.2 * (i - 1.5) for place in bars]
            label = f"{name}, {WHATS[what]}"
            left.bar(at, [row["median_ms"] for row in bars.values()], 0.2, color=color, label=label)
            if name == ADAMS:
                ratios = {place: row.get("ratio_to_fused_adamw", float("nan")) for place, row in bars.items()}
                at = [place + 0.4 * (i // 2 - 0.5) for place in ratios]
                drawn = right.bar(at, ratios.values(), 0.4, color=color)
                labels = [f"{ratio:.2f}" if ratio == ratio else "" for ratio in ratios.values()]
                for text in right.bar_label(drawn, labels, padding=2, fontsize=7):
                    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        left.set_yscale("log")
        left.set_ylabel("ms")
        right.set_ylabel(f"times {BASELINE}")
        right.margins(y=0.15)
        for axis in (left, right):
            axis.set_title(engine, fontsize=10)
            axis.set_xticks(range(len(cases)), [f"{model}\n{ranks}" for model, ranks in cases], fontsize=8)
            axis.set_xlim(-0.6, len(cases) - 0.4)
    for axis in axes[-1]:
        axis.set_xlabel("model, ranks", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024, 4096])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repetitions", type=int, default=5, help="of every optimizer, at least (default 5)")
    parser.add_argument("--seconds", type=float, default=1, help="in which short steps are repeated (default 1)")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    parser.add_argument(
        "--max_local_elements",
        type=float,
        default=1.6e8,
        help="of this rank's shards, of which there are four: weights, gradients, two moments (default 1.6e8)",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--name", help="of the files (default: scale-cpu-DATE)")
    arguments = parser.parse_args()
    if arguments.repetitions < 3:
        parser.error(f"--repetitions {arguments.repetitions}: at least 3, for quartiles")
    if any(ranks < TP or ranks % TP for ranks in arguments.ranks):
        parser.error(f"--ranks {arguments.ranks}: multiples of {TP}, for tensor parallelism")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    rows: list[dict] = []
    for engine in arguments.engines:
        for name in arguments.models:
            for ranks in arguments.ranks:
                print(f"{engine}, {name} on {ranks} ranks ...", flush=True)
                rows += measure(
                    engine,
                    name,
                    MODELS[name],
                    ranks,
                    max_local_elements=int(arguments.max_local_elements),
                    repetitions=arguments.repetitions,
                    seconds=arguments.seconds,
                )
                gc.collect()  # modules and their hooks refer to one another

    name = arguments.name or f"scale-cpu-{datetime.date.today().isoformat()}"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    json_path, table_path, plot_path = (arguments.output_dir / f"{name}.{kind}" for kind in ("json", "md", "png"))
    head = machine(CPU)
    json_path.write_text(json.dumps({"machine": head, "rows": rows}, indent=1) + "\n")
    lines = [
        f"# One rank of many: {name}",
        "",
        *head,
        f"- at least {arguments.repetitions} repetitions, in which the optimizers take turns; medians of times and of "
        "ratios within a repetition; quartiles are in the .json",
        "- elements: of the weights in this rank's shards",
        "",
        *summary(rows),
        *table(rows),
    ]
    write_report(table_path, lines, lambda: plot(rows, plot_path))


if __name__ == "__main__":
    main()
