"""Times a Grok-1 layer on one GPU, and compares it with the least time that this GPU needs.

    python -m milliways.benchmarks.gpu_layer [--deterministic] [--json FILE]
        [--layers N] [--repeats N]
    python -m milliways.benchmarks.gpu_layer --small        # small layers on any device, as a check

Layers of full width (6144 / 32768 / 8 experts, 48 and 8 heads of 128) with random int8 weights run
one after another. There are as many as fit into memory, and at least two, so that no weights stay
in the cache until their next use. Each row of the table is one step: one token each of 1 to 256
sequences that have 512 earlier positions, or a prefill. The floors are measured in the same run:
the rate of a copy on the device (bytes read and written), and of a large bfloat16 product. Times
are medians of samples that are taken in turn, after a warm-up. Attention and experts are also timed
alone; their sum may differ from the layer.

`--deterministic` also times the mode in which a row has the same bits in any batch, and shows its
cost. The report always says, for both modes, which numbers of rows give a row the same bits.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from milliways.benchmarks.gpu_bits import Classes, bit_classes
from milliways.benchmarks.gpu_chain import Row, measure
from milliways.benchmarks.gpu_floors import Floors, measure_floors
from milliways.benchmarks.gpu_workload import Layer, Workload, make_layer, tree_bytes
from milliways.model.config import GROK_1, ModelConfig
from milliways.model.ops.gpu import GpuOps

MODES = {"default": GpuOps(), "deterministic": GpuOps(deterministic=True)}
# Memory for caches, activations, and XLA itself.
RESERVED_BYTES = 8 << 30
MAX_LAYERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and with which sizes."""

    config: ModelConfig
    batches: tuple[int, ...]
    prefills: tuple[int, ...]
    context: int
    copied_bytes: int
    matmul_size: int

    @property
    def workloads(self) -> list[Workload]:
        decodes = [
            Workload(num_tokens=count, is_prefill=False, context=self.context)
            for count in self.batches
        ]
        return decodes + [Workload(num_tokens=count, is_prefill=True) for count in self.prefills]


FULL = Plan(
    config=GROK_1,
    batches=(1, 8, 32, 128, 256),
    prefills=(512, 2048),
    context=512,
    copied_bytes=1 << 30,
    matmul_size=8192,
)
SMALL = Plan(
    config=replace(
        GROK_1, emb_size=64, ffn_size=96, key_size=16, num_q_heads=4, num_kv_heads=2, vocab_size=64
    ),
    batches=(1, 4),
    prefills=(20,),
    context=20,
    copied_bytes=1 << 16,
    matmul_size=64,
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    plan = SMALL if options.small else FULL
    if not options.small and jax.default_backend() != "gpu":
        sys.exit(
            f"no GPU: JAX computes on {jax.default_backend()!r}, and a layer of full width needs a "
            "GPU (install jax[cuda12]); --small runs small layers on any device"
        )
    floors = measure_floors(plan.copied_bytes, plan.matmul_size, options.repeats)
    layers = _make_layers(plan, options.layers)
    print(_describe(plan, floors, len(layers)))
    rows = _measure_all(plan, floors, layers, options)
    bits = {mode: _bits_of(mode, plan, layers[0]) for mode in MODES}
    print(_bits_report(bits))
    if options.json:
        report = _as_json(plan, floors, len(layers), rows, bits)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a Grok-1 layer on one GPU.")
    option = parser.add_argument
    option("--deterministic", action="store_true", help="also time the deterministic mode")
    option("--small", action="store_true", help="use small layers, which run on any device")
    option("--layers", type=int, metavar="N", help="number of layers [as many as fit into memory]")
    option(
        "--repeats", type=int, default=20, metavar="N", help="samples for each time [%(default)s]"
    )
    option("--json", type=Path, metavar="FILE", help="also write the results to a file")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 2:
        parser.error("--layers must be at least 2: a single layer could stay in the cache")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def _make_layers(plan: Plan, num_layers: int | None) -> list[Layer]:
    first = make_layer(plan.config, seed=0)
    count = num_layers or _num_that_fit(tree_bytes((first.attention, first.experts)))
    return [first, *(make_layer(plan.config, seed) for seed in range(1, count))]


def _num_that_fit(layer_bytes: int) -> int:
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return 2
    return max(2, min(MAX_LAYERS, (stats["bytes_limit"] - RESERVED_BYTES) // layer_bytes))


def _measure_all(
    plan: Plan, floors: Floors, layers: list[Layer], options: argparse.Namespace
) -> list[Row]:
    modes = MODES if options.deterministic else {"default": MODES["default"]}
    print(_header())
    rows: list[Row] = []
    for workload in plan.workloads:
        measured = measure(modes, plan.config, layers, workload, options.repeats, floors)
        for row in measured:
            print(_line(row, measured[0]), flush=True)
        rows += measured
    return rows


def _bits_of(mode: str, plan: Plan, layer: Layer) -> dict[str, Classes]:
    return bit_classes(MODES[mode], plan.config, layer, [*plan.batches, *plan.prefills])


def _describe(plan: Plan, floors: Floors, num_layers: int) -> str:
    config = plan.config
    return (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {num_layers} layers of "
        f"{config.emb_size} / {config.ffn_size} / {config.num_experts} experts, int8 weights, "
        f"bfloat16 activations; {plan.context} earlier positions of each decoding sequence\n"
        f"floors: copy {floors.bytes_per_s / 1e9:.1f} GB/s read and written, "
        f"bfloat16 product {floors.flops_per_s / 1e12:.3f} TFLOP/s\n"
    )


COLUMNS = (
    "| step | mode | ms/layer | floor ms | by | ratio | attention ms (floor) | experts ms (floor) "
    "| share attention / experts | experts read | x default |"
)


def _header() -> str:
    return f"{COLUMNS}\n{'|---' * (COLUMNS.count('|') - 1)}|"


def _line(row: Row, default: Row) -> str:
    """A line of the table. The last column is the time divided by that of the default mode."""
    alone_ms = row.attention_ms + row.experts_ms
    cells = (
        row.shape,
        row.mode,
        f"{row.layer_ms:.3f}",
        f"{row.floor_ms:.3f}",
        row.bound_by,
        f"{row.ratio:.2f}",
        f"{row.attention_ms:.3f} ({row.attention_floor_ms:.3f})",
        f"{row.experts_ms:.3f} ({row.experts_floor_ms:.3f})",
        f"{row.attention_ms / alone_ms:.0%} / {row.experts_ms / alone_ms:.0%}",
        f"{row.num_experts_read:.1f}",
        f"{row.layer_ms / default.layer_ms:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _bits_report(bits: dict[str, dict[str, Classes]]) -> str:
    lines = ["", "groups of numbers of rows that give a row the same bits:"]
    for mode, by_kernel in bits.items():
        for kernel, classes in by_kernel.items():
            groups = " | ".join(" ".join(map(str, sizes)) for sizes in classes)
            verdict = "all" if len(classes) == 1 else "differ"
            lines.append(f"  {mode:14} {kernel:10} {verdict:7} {groups}")
    return "\n".join(lines)


def _as_json(
    plan: Plan,
    floors: Floors,
    num_layers: int,
    rows: list[Row],
    bits: dict[str, dict[str, Classes]],
) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "plan": asdict(plan),
        "num_layers": num_layers,
        "floors": asdict(floors),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "rows_with_equal_bits": bits,
    }


if __name__ == "__main__":
    main()
