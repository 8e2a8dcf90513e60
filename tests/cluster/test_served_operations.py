"""A real cluster as its operators see it: metrics, states, open ports."""

import asyncio

import grpc
import httpx
import psutil
from google.protobuf import descriptor_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from milliways.cluster.ingress.public_grpc.service import SERVICE
from milliways.v1 import generate_pb2, generate_pb2_grpc
from tests.ingresses import demo_model
from tests.served_cluster import ServedCluster

WORKERS = {"worker-0", "worker-1", "worker-2"}
NUM_LAYERS, NUM_EXPERTS = 4, 8


def test_greeting_has_addresses_and_a_command_to_try(cluster: ServedCluster) -> None:
    log = cluster.log
    assert f"{cluster.url}/v1" in log and f"127.0.0.1:{cluster.grpc_port}" in log
    assert f"curl -N {cluster.url}/v1/completions" in log
    assert "3 of 3 workers ready" in log


def test_metrics_of_ingress_routers_and_workers_are_on_one_page(cluster: ServedCluster) -> None:
    body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    before = cluster.metrics()
    assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).status_code == 200
    after = cluster.metrics()
    count = 'milliways_requests_total{code="200",model="demo",surface="http"}'
    assert after[count] == before.get(count, 0) + 1
    tokens = 'milliways_tokens_total{kind="completion"}'
    assert after[tokens] == before.get(tokens, 0) + 3

    def total(figures: dict[str, float], name: str) -> float:
        return sum(v for k, v in figures.items() if k.partition("{")[0] == name)

    for name in ("milliways_router_tokens_total", "milliways_router_steps_total"):
        assert total(after, name) - total(before, name) >= 3
    assert total(after, "milliways_worker_rows_total") > total(
        before, "milliways_worker_rows_total"
    )
    assert sum(k.endswith(',state="ready"}') and v == 1 for k, v in after.items()) == 3
    assert after["milliways_placement_epoch"] >= 1
    for name in ("milliways_kv_blocks_total", "milliways_queue_length"):
        assert {k for k in after if k.startswith(name)} == {
            f'{name}{{worker_id="{worker_id}"}}' for worker_id in WORKERS
        }


def test_status_describes_every_worker(cluster: ServedCluster) -> None:
    status = cluster.status()
    assert status["is_complete"] and status["model"] == "demo"
    workers = {worker["worker_id"]: worker for worker in status["workers"]}
    assert set(workers) == WORKERS
    held: list[tuple[int, int]] = []
    for worker in workers.values():
        assert worker["state"] == "ready" and worker["waits_for"] == ""
        assert worker["role"] == "attention+router+experts"
        assert worker["node"] and worker["incarnation"] >= 1
        assert worker["layers"] == [0, NUM_LAYERS]
        assert worker["placement_epoch"] == status["placement_epoch"]
        assert psutil.pid_exists(worker["pid"])
        router = worker["router"]
        assert 0 <= router["kv_blocks_used"] <= router["kv_blocks_total"]
        assert router["tokens_per_s"] >= 0
        # All workers are on one host, so they use shared memory.
        others = WORKERS - {worker["worker_id"]}
        expected = {worker["worker_id"]: "direct"} | dict.fromkeys(others, "shm+ring")
        assert router["transports"].items() <= expected.items()
        held += [tuple(pair) for pair in worker["experts"]]
    every = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
    assert sorted(held) == sorted(every * 2)


def test_status_is_a_readable_table(cluster: ServedCluster) -> None:
    heading, _, names, *lines = cluster.command("status").stdout.splitlines()
    assert heading.startswith("model demo, placement epoch ") and ", complete, " in heading
    columns = [
        "worker",
        "incarnation",
        "pid",
        "node",
        "state",
        "role",
        "layers",
        "experts",
        "kv",
        "tok/s",
    ]
    assert names.split() == [*columns, "transports"]
    assert {line.split()[0] for line in lines} == WORKERS
    for line in lines:
        assert line.split()[4:7] == ["ready", "attention+router+experts", "0-3"]


def test_workers_read_only_the_bytes_of_their_shards(cluster: ServedCluster) -> None:
    for worker in cluster.status()["workers"]:
        assert abs(worker["bytes_read"] - worker["bytes_wanted"]) <= 0.02 * worker["bytes_wanted"]


def test_everything_listens_on_the_loopback_address(cluster: ServedCluster) -> None:
    listening: list[tuple[int, str, int]] = []
    for process in cluster.processes():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.append((process.pid, connection.laddr.ip, connection.laddr.port))
    ports = {port for _, _, port in listening}
    assert {cluster.http_port, cluster.grpc_port} <= ports
    away = [one for one in listening if one[1].removeprefix("::ffff:") != "127.0.0.1"]
    assert away == []


def test_probes(cluster: ServedCluster) -> None:
    assert httpx.get(f"{cluster.url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{cluster.url}/ready", timeout=30).json() == {"status": "ready"}


def test_grpc_operations(cluster: ServedCluster) -> None:
    model, text = demo_model(), "The answer to life"
    serving = health_pb2.HealthCheckResponse.SERVING

    async def main() -> None:
        async with cluster.channel() as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            tokens = await stub.Tokenize(generate_pb2.TokenizeRequest(text=text))
            assert tuple(tokens.token_ids) == model.encode(text)
            back = generate_pb2.DetokenizeRequest(token_ids=tokens.token_ids)
            assert (await stub.Detokenize(back)).text == text
            (served,) = (await stub.ListModels(generate_pb2.ListModelsRequest())).models
            assert (served.name, served.context_tokens) == ("demo", 512)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            assert (await health.Check(request)).status == serving
            watch = health.Watch(request)
            assert (await watch.read()).status == serving
            watch.cancel()
            await check_reflection(channel)

    asyncio.run(main())


async def check_reflection(channel: aio.Channel) -> None:
    """A client without our stubs lists the services."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = [a async for a in stub.ServerReflectionInfo(iter(questions))]
    assert SERVICE in {service.name for service in listed.list_services_response.service}
    (raw, *_) = described.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(raw)
    assert [service.name for service in file.service] == ["GenerateService"]


def test_unknown_method_is_unimplemented(cluster: ServedCluster) -> None:
    async def main() -> grpc.StatusCode:
        async with cluster.channel() as channel:
            call = channel.unary_unary(f"/{SERVICE}/Nothing", lambda raw: raw, lambda raw: raw)(b"")
            return await call.code()

    assert asyncio.run(main()) is grpc.StatusCode.UNIMPLEMENTED
