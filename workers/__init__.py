"""A worker: the shards that it computes, and the order in which it computes calls to them.

    experts = ExpertShard(decoder)
    for layer, groups in loader.load_experts(wanted):
        experts.add(layer, groups)
    core = WorkerCore("worker-0", incarnation, experts, attention, tasks)
    core.fence.move(WorkerState.READY)
    tasks.start_service(core.serve())
    core.submit(call, fence, reply)                 # of another process: queued
    result = core.direct.compute_now(call, fence)   # of the router in this process: at once

Owns an attention shard with its KV blocks, some experts, and the queue of calls to them. Knows no
requests and no sequences: only rows of tokens.

Invariants:
- A row has the same outputs, to the bit, whichever other rows are computed with it.
- Each call gets one reply: a result, or a refusal with its reason.
- A call that acts on an older placement, or means another incarnation, is not computed.
- What two threads use is not changed, only replaced (docs/ARCHITECTURE.md, Threads).
"""
