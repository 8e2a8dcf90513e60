"""Which router serves a request, and what happens if that router fails, drains or falls silent.

    class Routers:  # a RouterDirectory; the cluster's follows the controller's view
        def routers(self):
            return [RouterInfo("worker-0", "127.0.0.1:7000")]

        async def changed(self):
            await asyncio.Event().wait()

    source = RouterSource(Routers())
    deadline_s = time.monotonic() + 60.0
    async for event in source.generate(request, request_id=new_request_id(), deadline_s=deadline_s):
        print(event)
    await source.close()

- `router_source` runs requests; `router_choice` picks a router; `retries` decides on retries.
- `router_connection` holds a channel to a router, and `silence` decides when that router is silent.
- `race` runs one request on two routers, if the first is silent.

Invariants:

- The stream of a request has each token once and in order, whichever routers computed them.
- At most two routers compute a request at the same time.
- The failure of one router never ends a request: another router continues it.
"""
