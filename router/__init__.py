"""Sequences, scheduling and the step loop; between the layers, sending tokens to their experts.

    links = LinkTable("worker-0", incarnation, connector.connect, tasks)
    dispatcher = Dispatcher(links, DispatchLimits(), tasks)
    pipeline = Pipeline(num_layers, links, dispatcher, tasks, timeout_s=10.0)
    router = Router(config, pool, RouterLimits(), links, pipeline, detokenizer_for, tasks)
    tasks.start_service(router.serve())
    router.submit(routed_request, listener)

`LocalEngine` is the same step loop over a model in this process, without links.

Owns the requests of one chain of attention shards from `submit` to the last call of their listener,
and the KV blocks that their sequences hold.

Invariants:
- A token has the same bits whichever workers compute it, alone or in any batch.
- A request that ended or was cancelled holds no block when the next step is chosen.
- Everything runs in one thread and under the clock of `Tasks`; only `server` knows gRPC.
"""
