"""Programs that measure Milliways and break it on purpose, and the training of the demo model.

    from milliways.benchmarks.speed.bench_model import BENCH_CONFIG
    from milliways.benchmarks.speed.floors import work_of
    from milliways.benchmarks.speed.workload import Kind, Workload

    print(work_of(BENCH_CONFIG, Workload(Kind.DECODE, 8)).read_bytes)

It owns `speed` (`milliways bench`), `chaos` (`milliways chaos`), `demo` (language and training of
the demo model), `full_size` (decodes with a full-size Grok-1) and `gpu_layer` with its `gpu_*`
parts (times a layer on a GPU).

Invariants: nothing that serves imports this package; only the command line does.
"""
