"""grpc.health.v1: reports SERVING while a token can be made."""

from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from milliways.cluster.ingress.readiness import CACHED_FOR_S, Readiness
from milliways.wire.errors import UnavailableError

Context = aio.ServicerContext[Any, Any]
Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers for the whole server (empty name) and for each service; all have the same status."""

    def __init__(
        self, readiness: Readiness, services: tuple[str, ...], poll_s: float = CACHED_FOR_S
    ) -> None:
        self._readiness = readiness
        self._services = ("", *services)
        self._poll_s = poll_s

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r} on this server"
            )
        return Status(status=await self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        last_sent: int | None = None
        while True:
            # Asked first: a probe that began before the drain would say that all is well.
            is_last = self._readiness.is_draining
            # `Readiness` caches: all watchers together cause at most one probe a second.
            status = await self._status(request.service)
            if status != last_sent:
                await context.write(Status(status=status))
                last_sent = status
            if is_last:
                # It stays so, and an open call would keep the server from stopping.
                return
            await self._readiness.wait_for_drain(self._poll_s)

    async def _status(self, service: str) -> Status.ServingStatus:
        if service not in self._services:
            return Status.SERVICE_UNKNOWN
        try:
            await self._readiness.check()
        except UnavailableError:
            return Status.NOT_SERVING
        return Status.SERVING
