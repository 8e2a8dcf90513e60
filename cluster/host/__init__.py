"""Puts model, router and worker together in one process.

    from milliways.cluster.host.local import cache_size_for, load_local_model, make_local_engine
    from milliways.model.model_dir import resolve_model_dir

    model = load_local_model(resolve_model_dir("demo"), "float32")
    engine = make_local_engine(model, cache_size_for(num_sequences=1, num_tokens_each=64))

Owns the composition of a process without a cluster (`local`) and of a cluster's worker
(`worker_process`), with the threads of the latter.

Invariants:
- Only composition is here. What is computed, queued or decided is in the rooms below.
- An object of a worker belongs to one of its two threads (docs/ARCHITECTURE.md, Threads).
"""
