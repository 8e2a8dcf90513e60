"""Clients of a served cluster, one for each endpoint. They record when tokens arrive."""

import http.client
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc

from milliways.benchmarks.speed.serving import Timeline
from milliways.v1 import generate_pb2, router_pb2, sampling_pb2

_TIMEOUT_S = 120.0
_ROUTE = "/milliways.v1.RouterService/Route"
_GENERATE = "/milliways.v1.GenerateService/Generate"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """The request that is sent to all endpoints."""

    prompt_ids: tuple[int, ...]
    max_tokens: int


class RouterBenchClient:
    """Reads a router's own stream, as the ingress does."""

    def __init__(self, address: str, request: BenchRequest) -> None:
        self._request = request
        # Several clients may ask the same router.
        self._name = f"bench-{secrets.token_hex(4)}"
        self._numbers = count()
        self._call: Any = grpc.insecure_channel(address).unary_stream(
            _ROUTE,
            request_serializer=router_pb2.RouteRequest.SerializeToString,
            response_deserializer=router_pb2.RouteResponse.FromString,
        )

    def __call__(self) -> Timeline:
        request = router_pb2.RouteRequest(
            request_id=f"{self._name}-{next(self._numbers)}",
            prompt_token_ids=self._request.prompt_ids,
            max_tokens=self._request.max_tokens,
            sampling=_greedy(),
            ignore_eos=True,
        )
        return _timed(self._request, _with_events(self._call, request))


class GrpcBenchClient:
    """Calls the public gRPC service."""

    def __init__(self, address: str, request: BenchRequest) -> None:
        self._request = request
        self._call: Any = grpc.insecure_channel(address).unary_stream(
            _GENERATE,
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generate_pb2.GenerateResponse.FromString,
        )

    def __call__(self) -> Timeline:
        request = generate_pb2.GenerateRequest(
            tokens=generate_pb2.TokenIds(token_ids=self._request.prompt_ids),
            max_tokens=self._request.max_tokens,
            sampling=_greedy(),
            ignore_eos=True,
        )
        return _timed(self._request, _with_events(self._call, request))


class HttpBenchClient:
    """Streams from `/v1/completions`, over one connection for all requests."""

    def __init__(self, address: str, model: str, request: BenchRequest) -> None:
        self._request = request
        self._connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
        body = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "seed": 0,
            "ignore_eos": True,
            "stream": True,
        }
        self._body = json.dumps(body)

    def __call__(self) -> Timeline:
        return _timed(self._request, self._chunks())

    def _chunks(self) -> Iterator[None]:
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", self._body, headers)
        response = self._connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"HTTP {response.status}: {response.read().decode()}")
        while line := response.readline():
            if line.startswith(b"data: {"):
                yield None


def _timed(request: BenchRequest, tokens: Iterator[None]) -> Timeline:
    """The times of the first and the last token.

    Tokens in between may arrive together, or have no text, so their number is not counted here.
    """
    begin_s = time.perf_counter()
    times = [time.perf_counter() - begin_s for _ in tokens]
    if not times:
        raise RuntimeError("the stream had no token")
    return Timeline(times[0], times[-1], request.max_tokens, tuple(times))


def _with_events(call: Any, request: Any) -> Iterator[None]:
    for response in call(request, timeout=_TIMEOUT_S):
        if response.events:
            yield None


def _greedy() -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(temperature=0.0, seed=0)
