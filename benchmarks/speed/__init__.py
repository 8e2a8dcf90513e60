"""Compares our speed with other engines and with the limits of the machine.

    from milliways.benchmarks.speed.dataplane import format_hops, measure_hops

    print(format_hops(measure_hops(num_rounds=2, calls_per_round=10)))

It owns what `milliways bench` and its parts run: `engines` compares engines, `distribution` a
cluster with one process, `dataplane` our links with bare sockets, `served` and `serving` the
endpoints of a cluster. `programs` has the programs that contestants run.

One run of `milliways bench`:

1. The model is made (`bench_model`) or given. A copy in llama.cpp's format is written to the cache
   (`gguf_model`).
2. Every contestant starts in a process of its own, and is stopped (`contestant`).
3. In each round, every workload is measured with one contestant after the other (`rounds`), and the
   limits of the machine are measured (`machine`).
4. Medians, ratios and the reached share of the limits are printed (`table`).

Invariants:

- Contestants that are compared take turns in the same run, so that they share its conditions.
- While one contestant is measured by `milliways bench`, all others are stopped.
- Another engine that is missing or fails becomes a note in the report, not an error.
"""
