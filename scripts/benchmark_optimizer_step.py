#!/usr/bin/env python
"""Time of one optimizer step: AdamS beside torch's AdamW and beside other AdamS, in one run, on CPU or an accelerator.

    python scripts/benchmark_optimizer_step.py                      # all suites on the CPU; minutes
    python scripts/benchmark_optimizer_step.py --device cuda --suites shapes memory

Writes NAME.csv, NAME.md and (with matplotlib) NAME.png into --output_dir. All contenders of a case are timed in turn,
repetition by repetition, so that what disturbs the machine disturbs all; figures are medians, and ratios are to fused
AdamW of the same repetition. Before a contender is timed its weights are compared with float64 references
(tests/support/reference_adams.py, and torch's AdamW in float64).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # accelerate needs it, too
import torch
import torch.distributed as dist
from torch.nn import Parameter


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from benchmark_tools import (  # noqa: E402
    ADAMS_COLOUR,
    ADAMW_COLOUR,
    DECAY,
    LR,
    MAX_NORM,
    OTHER_COLOUR,
    machine,
    quartiles,
    rows_of,
    share_moments,
    time_in_turn,
    write_report,
)
from reference_adams import ReferenceAdamS  # noqa: E402

from hf_swd import AdamS, ScheduledWeightDecay  # noqa: E402


BASELINE = "AdamW fused"
WORDS = {"step": 7, "clip": 10}  # that fused AdamW moves per parameter: docs/benchmarks/README.md
FIELDS = (
    "suite",
    "case",
    "parameters",
    "tensors",
    "contender",
    "what",
    "median_ms",
    "first_quartile_ms",
    "third_quartile_ms",
    "repetitions",
    "ratio_to_fused_adamw",
    "peak_extra_bytes",
    "relative_error",
)


@dataclass(frozen=True)
class Contender:
    """An optimizer, how it is stepped, and which reference its weights are compared with ("adamw" or "adams")."""

    name: str
    build: Callable[[list[Parameter]], torch.optim.Optimizer]
    reference: str
    own_clipping: bool = False  # the optimizer's option max_grad_norm, inside the step; else torch's
    reads_moments: bool = False  # in every step, as while parameters' step counts differ
    heavy: bool = False  # left out of the suites that grow

    def step(self, optimizer: torch.optim.Optimizer, params: list[Parameter], clip: bool) -> None:
        if self.own_clipping:
            for group in optimizer.param_groups:
                group["max_grad_norm"] = MAX_NORM if clip else 0.0
        elif clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        if self.reads_moments:
            optimizer.schedule.refresh()
        optimizer.step()


def scheduled_adamw(params: list[Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    ScheduledWeightDecay(optimizer)
    return optimizer


def contenders(device: torch.device) -> list[Contender]:
    adamw, settings = torch.optim.AdamW, {"lr": LR, "weight_decay": DECAY}
    found = [
        Contender(BASELINE, lambda ps: adamw(ps, fused=True, **settings), "adamw"),
        Contender("AdamW foreach", lambda ps: adamw(ps, foreach=True, **settings), "adamw", heavy=True),
        Contender("AdamW single", lambda ps: adamw(ps, foreach=False, fused=False, **settings), "adamw", heavy=True),
        Contender("AdamS fused", lambda ps: AdamS(ps, **settings), "adams"),
        Contender("AdamS fused, own clipping", lambda ps: AdamS(ps, **settings), "adams", own_clipping=True),
        Contender("AdamS fused, reading moments", lambda ps: AdamS(ps, **settings), "adams", reads_moments=True),
        Contender("AdamS foreach", lambda ps: AdamS(ps, foreach=True, **settings), "adams", heavy=True),
        Contender("AdamS single", lambda ps: AdamS(ps, foreach=False, fused=False, **settings), "adams", heavy=True),
        Contender("ScheduledWeightDecay on AdamW fused", scheduled_adamw, "adams"),
    ]
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import AdamS as OtherAdamS

        found.append(
            Contender("pytorch_optimizer's AdamS", lambda ps: OtherAdamS(ps, **settings), "adams", heavy=True)
        )
    return found


# What is optimized


def model_shapes(name: str) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a model in its default ("base") configuration."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    config, cls = {"bert-base": (BertConfig, BertModel), "vit-base": (ViTConfig, ViTModel)}[name]
    with torch.device("meta"):
        return [tuple(p.shape) for p in cls(config()).parameters()]


def make(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters with gradients of total norm 10, the same for every call."""
    torch.manual_seed(0)
    scale = 10 / sum(torch.Size(shape).numel() for shape in shapes) ** 0.5
    params = [Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * scale
    return params


def relative_error(contender: Contender, device: torch.device, clip: bool) -> float:
    """Distance of the weights from the float64 reference after 5 steps with strong decay, relative to their way."""
    shapes = [(300, 70), (64,), (), (5000,), (3, 5, 7)]
    params = make(shapes, device)
    start = [p.detach().double().cpu() for p in params]
    optimizer = contender.build(params)
    twins = [Parameter(p.detach().double().cpu()) for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
        group["weight_decay"] = 1.0 if contender.reference == "adamw" else 1e-1
        if "initial_weight_decay" in group:
            group["initial_weight_decay"] = group["weight_decay"] = 1e-1
    if contender.reference == "adamw":
        reference = torch.optim.AdamW(twins, lr=1e-2, weight_decay=1.0, foreach=False, fused=False)
    else:
        reference = ReferenceAdamS([{"params": twins}], lr=1e-2, weight_decay=1e-1)
    for step in range(5):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype).to(device)
            twin.grad = p.grad.double().cpu()
        contender.step(optimizer, params, clip)
        if clip:
            torch.nn.utils.clip_grad_norm_(twins, MAX_NORM)
        if contender.reference == "adamw":
            reference.step()
        else:
            reference.step([[twin.grad for twin in twins]])
    final = reference.groups[0]["params"] if isinstance(reference, ReferenceAdamS) else [t.detach() for t in twins]
    pairs = list(zip(params, final, start, strict=True))
    error = sum((p.detach().double().cpu() - w).square().sum() for p, w, _ in pairs)
    return (error / sum((w - s).square().sum() for _, w, s in pairs)).sqrt().item()


def compare(
    suite: str,
    case: str,
    shapes: list[tuple[int, ...]],
    field: list[Contender],
    arguments,
    *,
    shared: bool = False,
) -> list[dict]:
    """All contenders on the same parameters and gradients, each with its own state, or (`shared`) all with one."""
    device = arguments.device
    params = make(shapes, device)
    optimizers = {contender.name: contender.build(params) for contender in field}
    if shared:
        share_moments(list(optimizers.values()), params)
    size = {"parameters": sum(p.numel() for p in params), "tensors": len(params)}
    rows = []
    for what in ("step", "clip"):
        clip = what == "clip"
        grads = [p.grad for p in params]

        functions = {
            c.name: lambda c=c, clip=clip: c.step(optimizers[c.name], params, clip)
            for c in field
            if clip or not c.own_clipping
        }
        times = time_in_turn(
            functions,
            arguments.repetitions,
            # Above the largest norm again, whoever clipped last.
            (lambda grads=grads: torch._foreach_mul_(grads, 2.0)) if clip else (lambda: None),
        )
        rows += rows_of(times, BASELINE, suite=suite, case=case, what=what, **size)
    size["parameters"] = min(size["parameters"], 10**8)
    copy = torch.empty(size["parameters"], device=device)
    source = torch.empty_like(copy)
    times = time_in_turn({"plain copy (2 words)": lambda: copy.copy_(source)}, arguments.repetitions)
    median, first, third = quartiles(times["plain copy (2 words)"])
    rows.append(
        {
            "suite": suite,
            "case": case,
            **size,
            "contender": "plain copy (2 words)",
            "what": "copy",
            "median_ms": median,
            "first_quartile_ms": first,
            "third_quartile_ms": third,
            "repetitions": arguments.repetitions,
        }
    )
    return rows


def peak_extra(function: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory in use rises during the call: of the allocator, or (CPU, Linux) of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


# Suites


def suite_shapes(arguments) -> list[dict]:
    rows = []
    for model in ("bert-base", "vit-base"):
        rows += compare("shapes", model, model_shapes(model), contenders(arguments.device), arguments)
    return rows


def suite_memory(arguments) -> list[dict]:
    rows = []
    shapes = model_shapes("bert-base")
    for contender in contenders(arguments.device):
        params = make(shapes, arguments.device)
        optimizer = contender.build(params)
        for _ in range(2):
            contender.step(optimizer, params, contender.own_clipping)
        extra = peak_extra(lambda c=contender, o=optimizer, ps=params: c.step(o, ps, c.own_clipping), arguments.device)
        size = {"parameters": sum(p.numel() for p in params), "tensors": len(params)}
        what = "clip" if contender.own_clipping else "step"
        rows.append(
            {
                "suite": "memory",
                "case": "bert-base",
                **size,
                "contender": contender.name,
                "what": what,
                "peak_extra_bytes": extra,
            }
        )
        del params, optimizer
    return rows


def light(arguments) -> list[Contender]:
    return [contender for contender in contenders(arguments.device) if not contender.heavy]


def suite_tensors(arguments) -> list[dict]:
    rows = []
    for count in (200, 2_000, 20_000):
        rows += compare("tensors", f"{count} of 1000", [(1000,)] * count, light(arguments), arguments)
    return rows


def suite_sizes(arguments) -> list[dict]:
    field = light(arguments)
    rows = []
    for millions in (10, 100, 300, 1000):
        needed = 4 * (millions * 10**6 * 4 + 2 * 10**8)  # bytes: weights, gradients, two moments; the plain copy
        if needed > 0.8 * free_memory(arguments.device):
            print(f"sizes: {millions} M parameters need {needed / 2**30:.0f} GiB, more than there is: left out")
            continue
        rows += compare("sizes", f"{millions} M", [(10**6, 10)] * (millions // 10), field, arguments, shared=True)
    return rows


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def suite_reduction(arguments) -> list[dict]:
    """A step with and without the sum over the ranks, by gloo on this machine's cores: its latency alone."""
    rows = []
    for processes in (2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_reduction_worker, (processes, folder, arguments.repetitions), processes)
            times = torch.load(Path(folder) / "times.pt")
        rows += rows_of(
            times,
            BASELINE,
            suite="reduction",
            case=f"{processes} processes",
            what="step",
            parameters=10**6,
            tensors=100,
        )
    return rows


def _reduction_worker(rank: int, processes: int, folder: str, repetitions: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    device = torch.device("cpu")
    shapes = [(10_000,)] * 100
    optimizers = {
        BASELINE: torch.optim.AdamW(make(shapes, device), lr=LR, fused=True),
        "AdamS fused": AdamS(make(shapes, device), lr=LR, weight_decay=DECAY),
        "AdamS fused, reduced over the processes": AdamS(
            make(shapes, device), lr=LR, weight_decay=DECAY, process_group=dist.group.WORLD
        ),
    }

    def together(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: (dist.barrier(), step())

    functions = {name: together(optimizer.step) for name, optimizer in optimizers.items()}
    times = time_in_turn(functions, 5 * repetitions)
    if rank == 0:
        torch.save(times, Path(folder) / "times.pt")
    dist.barrier()
    dist.destroy_process_group()


SUITES = {
    "shapes": suite_shapes,
    "memory": suite_memory,
    "tensors": suite_tensors,
    "sizes": suite_sizes,
    "reduction": suite_reduction,
}


# What is written


def times_of(row: dict) -> str:
    """Its cells of median and quartiles."""
    return f"{row['median_ms']:.2f} | {row['first_quartile_ms']:.2f} to {row['third_quartile_ms']:.2f}"


def table(rows: list[dict]) -> list[str]:
    lines = []
    for key in dict.fromkeys((row["suite"], row["case"], row["what"]) for row in rows if row["what"] != "copy"):
        members = [row for row in rows if (row["suite"], row["case"], row["what"]) == key]
        suite, case, what = key
        size = f"{members[0]['parameters'] / 1e6:.1f} M parameters in {members[0]['tensors']} tensors"
        lines += ["", f"## {suite}: {case}, {'clipping + step' if what == 'clip' else 'step'} ({size})", ""]
        if suite == "memory":
            lines += ["| optimizer | peak above the level before, KiB |", "|---|---:|"]
            lines += [f"| {row['contender']} | {row['peak_extra_bytes'] / 1024:,.0f} |" for row in members]
            continue
        lines += [
            "| optimizer | median ms | quartiles | times fused AdamW | words per parameter and second, GB/s |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in members:
            words = {
                "AdamW fused": WORDS[what],
                "AdamS fused": WORDS[what] + 1,
                "ScheduledWeightDecay on AdamW fused": WORDS[what] + 1,
                "AdamS fused, own clipping": 9,
            }.get(row["contender"])
            speed = f"{4 * words * row['parameters'] / row['median_ms'] / 1e6:.1f} ({words} words)" if words else ""
            lines.append(f"| {row['contender']} | {times_of(row)} | {row['ratio_to_fused_adamw']:.2f} | {speed} |")
        for row in rows:
            if (row["suite"], row["case"], row["what"]) == (suite, case, "copy"):
                speed = 8 * row["parameters"] / row["median_ms"] / 1e6
                lines.append(f"| {row['contender']} | {times_of(row)} | | {speed:.1f} (2 words) |")
    return lines


def colour_of(contender: str) -> str:
    if contender.startswith("AdamW"):
        return ADAMW_COLOUR
    return OTHER_COLOUR if contender.startswith("pytorch_optimizer") else ADAMS_COLOUR


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["case"], r["what"]) for r in rows if r["suite"] == "shapes" and r["what"] != "copy"))
    if not cases:
        return
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(r["contender"] for r in rows if r["suite"] == "shapes" and r["what"] != "copy"))
    for axis, (case, what) in zip(axes, cases, strict=True):
        found = {r["contender"]: r for r in rows if r["suite"] == "shapes" and (r["case"], r["what"]) == (case, what)}
        ratios = [found[name]["ratio_to_fused_adamw"] if name in found else 0 for name in names]
        colors = [colour_of(name) for name in names]
        bars = axis.barh(names, ratios, color=colors)
        axis.bar_label(bars, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{case}, {'clipping + step' if what == 'clip' else 'step'}")
        axis.set_xlabel("time relative to fused AdamW")
        axis.margins(x=0.15)
        axis.invert_yaxis() if axis is axes[0] else None
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default), cuda, ...")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--repetitions", type=int, default=15, help="of every contender and case (default 15)")
    parser.add_argument("--threads", type=int, help="intra-op threads on the CPU (default: torch's)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--name", help="of the files (default: DEVICE-DATE)")
    arguments = parser.parse_args()
    if arguments.repetitions < 3:
        parser.error(f"--repetitions {arguments.repetitions}: at least 3, for quartiles")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device.type != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device {arguments.device}: torch sees no accelerator; use --device cpu")

    errors = {
        (contender.name, what): relative_error(contender, arguments.device, what == "clip")
        for contender in contenders(arguments.device)
        for what in ("step", "clip")
    }
    for (name, what), error in errors.items():
        print(f"{name:40s} {what:5s} distance from the float64 reference {error:.1e}")
        if error > 1e-4 and "pytorch_optimizer" not in name:
            raise SystemExit(f"{name} ({what}) is wrong by {error:.1e}: not timed")
    rows = []
    for suite in arguments.suites:
        print(f"suite {suite} ...", flush=True)
        rows += SUITES[suite](arguments)
        gc.collect()
    for row in rows:
        if (row["contender"], row["what"]) in errors:
            row["relative_error"] = errors[row["contender"], row["what"]]

    kind = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else str(arguments.device)
    name = arguments.name or f"{kind.lower().replace(' ', '-')}-{datetime.date.today().isoformat()}"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    csv_path, table_path, plot_path = (arguments.output_dir / f"{name}.{suffix}" for suffix in ("csv", "md", "png"))
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    lines = [
        f"# Optimizer step: {name}",
        "",
        *machine(arguments.device),
        "",
        "Distance of the weights from the float64 reference:",
        "",
    ]
    lines += ["| optimizer | step | clipping + step |", "|---|---:|---:|"]
    lines += [
        f"| {c} | {errors[c, 'step']:.1e} | {errors[c, 'clip']:.1e} |" for c in dict.fromkeys(c for c, _ in errors)
    ]
    lines += table(rows)
    write_report(table_path, lines, lambda: plot(rows, plot_path))


if __name__ == "__main__":
    main()
