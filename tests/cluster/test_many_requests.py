"""Ten thousand requests through the whole stack leave no memory behind."""

import asyncio
from collections.abc import Iterator
from itertools import count
from statistics import median
from typing import Any

import pytest

from milliways.v1 import generate_pb2, generate_pb2_grpc
from tests.served_cluster import ServedCluster, wait_until

NUM_REQUESTS = 10_000
AT_A_TIME = 16
# Memory is read this often. The comparison begins when programs are compiled and buffers grown.
NUM_LOOKS = 20
NUM_WARM = 5
# Limit on the growth of each process over 5,000 requests.
LEFT_BYTES_MAX = 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_ten_thousand_requests(cluster: ServedCluster) -> None:
    processes = cluster.processes()
    looks: list[list[int]] = []

    async def main() -> None:
        async with cluster.channel() as channel:
            service = generate_pb2_grpc.GenerateServiceStub(channel)
            numbers = count()
            for _ in range(NUM_LOOKS):
                end = (len(looks) + 1) * NUM_REQUESTS // NUM_LOOKS
                await asyncio.gather(*(_ask(service, numbers, end) for _ in range(AT_A_TIME)))
                # This fails if a process died meanwhile: its leaks would be gone with it.
                looks.append([process.memory_full_info().uss for process in processes])

    asyncio.run(main())
    warm = list(zip(*looks[NUM_WARM:], strict=True))
    third = (NUM_LOOKS - NUM_WARM) // 3
    num_between = 2 * third * NUM_REQUESTS // NUM_LOOKS
    left_bytes = {
        " ".join(process.cmdline())[:60]: (median(of[-third:]) - median(of[:third])) / num_between
        for process, of in zip(processes, warm, strict=True)
    }
    assert max(left_bytes.values()) <= LEFT_BYTES_MAX, left_bytes
    wait_until(lambda: is_idle(cluster), "nothing is held for requests that ended")


def is_idle(cluster: ServedCluster) -> bool:
    routers = [worker["router"] for worker in cluster.status()["workers"]]
    return not any(r["active_requests"] or r["kv_blocks_used"] for r in routers)


async def _ask(service: Any, numbers: Iterator[int], end: int) -> None:
    """Sends requests one after another, each with another prompt, up to a number."""
    for number in numbers:
        prompt = f"Number {number}: the answer to life"
        request = generate_pb2.GenerateRequest(
            model="demo", text=prompt, max_tokens=2, ignore_eos=True
        )
        num_tokens = 0
        async for response in service.Generate(request):
            num_tokens += len(response.events)
        assert num_tokens == 2
        # All clients share the numbers, so no request runs while memory is read.
        if number >= end:
            return
