"""Where the time of a decode step goes, in one process with the CPU kernels.

    python -m milliways.benchmarks.steps --model deep --activations exact --batch 1,8

A step is divided at the start and the end of each kernel, which the kernels log themselves. Every
moment belongs to one part: to the kernel that runs (of several, to the one that began first), or
to what lies between two kernels. The parts of a step add up to its time.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from milliways.benchmarks.speed.arguments import check_rounds, counts_of, find_model
from milliways.benchmarks.speed.bench_model import BENCH_NAME
from milliways.benchmarks.speed.programs.run_milliways import Bench, load_model
from milliways.benchmarks.speed.table import format_table
from milliways.benchmarks.speed.workload import PROMPT_TOKENS
from milliways.cluster.host.local import DTYPES
from milliways.model.activations import Activations
from milliways.model.ops.native_trace import KernelEvent, take_events, traced

HEAD = "output head"
BEFORE = "before the first kernel: Python, dispatch"
BETWEEN = "between kernels: XLA"
AFTER_HEAD = "after the head: drawing without its kernels, Python"
_NAMES = {
    "linear": "projections of attention",
    "norm": "norms, gate, rotary, weighing",
    "gate": "norms, gate, rotary, weighing",
    "rope": "norms, gate, rotary, weighing",
    "weigh": "norms, gate, rotary, weighing",
    "write_rows": "writing keys and values",
    "summarize": "kernels of drawing",
    "noise": "kernels of drawing",
}


def part_of(event: KernelEvent, vocab_size: int) -> str:
    """The row of the table that an operation belongs to."""
    if event.name == "linear" and event.width == vocab_size:
        return HEAD
    return _NAMES.get(event.name, event.name)


def divide_step(
    start_ns: int, end_ns: int, events: Sequence[KernelEvent], vocab_size: int
) -> dict[str, int]:
    """Nanoseconds of each part of one step; `events` are those of the step, by their start."""
    parts: dict[str, int] = defaultdict(int)
    now_ns, gap = start_ns, BEFORE
    for event in events:
        parts[gap] += max(0, event.start_ns - now_ns)
        part = part_of(event, vocab_size)
        parts[part] += max(0, event.end_ns - max(event.start_ns, now_ns))
        now_ns = max(now_ns, event.end_ns)
        if part == HEAD:
            gap = AFTER_HEAD
        elif gap == BEFORE:
            gap = BETWEEN
    parts[gap] += end_ns - now_ns
    return dict(parts)


def measure_steps(bench: Bench, vocab_size: int, batch: int, num_steps: int) -> dict[str, float]:
    """The parts of a step of this batch, in ms: means over the quicker half of the steps."""
    bench.time_steps(batch, PROMPT_TOKENS, num_steps)
    with traced():
        times = bench.time_steps(batch, PROMPT_TOKENS, num_steps)
        events = take_events()
    limit_ns = median(end_ns - start_ns for start_ns, end_ns in times)
    quick = [(start_ns, end_ns) for start_ns, end_ns in times if end_ns - start_ns <= limit_ns]
    totals: dict[str, float] = defaultdict(float)
    for start_ns, end_ns in quick:
        own = [event for event in events if start_ns <= event.start_ns < end_ns]
        for part, num_ns in divide_step(start_ns, end_ns, own, vocab_size).items():
            totals[part] += num_ns / 1e6 / len(quick)
    return dict(totals)


def format_steps(parts_by_batch: Mapping[int, Mapping[str, float]]) -> str:
    """A Markdown table, with the largest parts of the first batch on top."""
    first = next(iter(parts_by_batch.values()))
    names = sorted(
        {name for parts in parts_by_batch.values() for name in parts},
        key=lambda name: -first.get(name, 0.0),
    )
    rows = [
        ["a step", *(f"{sum(parts.values()):.2f}" for parts in parts_by_batch.values())],
        *([name, *(_shown(parts, name) for parts in parts_by_batch.values())] for name in names),
    ]
    return format_table(["ms", *(f"decode {batch}" for batch in parts_by_batch)], rows)


def _shown(parts: Mapping[str, float], name: str) -> str:
    value = parts.get(name, 0.0)
    return f"{value:.2f} ({100 * value / sum(parts.values()):.0f} %)"


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--model", default=BENCH_NAME, help="bench, deep, demo or a directory")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    kinds = [kind.value for kind in Activations]
    parser.add_argument("--activations", choices=kinds, default=Activations.EXACT.value)
    parser.add_argument("--batch", default="1,8,32", metavar="1,8", help="decode batch sizes")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="steps of each batch")
    parser.add_argument("--threads", type=int, help="number of threads [all cores]")
    options = parser.parse_args()
    batches = counts_of("batch", options.batch)
    check_rounds("steps", options.steps)
    sizes = argparse.Namespace(
        max_batch=max(batches), batch_tokens=PROMPT_TOKENS + options.steps, prompt_tokens=1
    )
    options.model_dir = find_model(options.model)
    model = load_model(options)
    bench, vocab_size = Bench(model, sizes), model.decoder.config.vocab_size
    parts = {batch: measure_steps(bench, vocab_size, batch, options.steps) for batch in batches}
    print(format_steps(parts))


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


if __name__ == "__main__":
    main()
