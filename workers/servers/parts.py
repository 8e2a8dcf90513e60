"""Parts of the model over gRPC: a worker gives what it holds, another takes what it cannot read."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import ml_dtypes
import numpy as np

from milliways.v1 import worker_pb2 as pb
from milliways.wire.channels import CLIENT_OPTIONS, channel_credentials
from milliways.wire.errors import UnavailableError
from milliways.wire.tls import TlsSettings

PIECE_BYTES = 1 << 20
# Each copies a part of the model, which for Grok-1 has up to 200 MB.
MOST_READERS = 2
_METHOD = "/milliways.v1.WorkerService/ReadPart"
_DTYPES = {str(np.dtype(kind)): np.dtype(kind) for kind in ("int8", "float32", ml_dtypes.bfloat16)}
# The arrays of a tensor or of one of its experts; empty if they are not held.
ReadHeld = Callable[[str, int | None], list[np.ndarray]]


class PartServer:
    """Answers `ReadPart`. The arrays are made in another thread than the one that computes.

    Invariant: at most MOST_READERS calls are answered at a time; more are refused.
    """

    def __init__(self, read: ReadHeld) -> None:
        self._read = read
        self._num_readers = 0

    def handler(self) -> Any:
        """For the table of a gRPC server."""
        return grpc.unary_stream_rpc_method_handler(
            self._answer,
            request_deserializer=pb.ReadPartRequest.FromString,
            response_serializer=pb.ReadPartResponse.SerializeToString,
        )

    async def _answer(
        self, request: pb.ReadPartRequest, context: Any
    ) -> AsyncIterator[pb.ReadPartResponse]:
        if self._num_readers >= MOST_READERS:
            text = f"{MOST_READERS} parts are being read here"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._num_readers += 1
        try:
            expert_id = request.expert if request.HasField("expert") else None
            arrays = await asyncio.to_thread(self._read, request.tensor, expert_id)
            if not arrays:
                text = f"{request.tensor} is not held here"
                await context.abort(grpc.StatusCode.NOT_FOUND, text)
            described = [pb.PartArray(dtype=str(a.dtype), shape=a.shape) for a in arrays]
            yield pb.ReadPartResponse(arrays=described)
            for array in arrays:
                flat = array.reshape(-1).view(np.uint8)
                for start in range(0, len(flat), PIECE_BYTES):
                    piece = flat[start : start + PIECE_BYTES].tobytes()
                    yield pb.ReadPartResponse(piece=piece)
        finally:
            self._num_readers -= 1


def fetch_part(
    address: str, tls: TlsSettings, tensor: str, expert_id: int | None, timeout_s: float
) -> list[np.ndarray]:
    """The arrays of a tensor, or of one of its experts, from the worker at an address. Blocks.

    Raises:
        UnavailableError: the worker does not give them; says why.
    """
    request = pb.ReadPartRequest(tensor=tensor, expert=expert_id)
    if tls.is_on:
        channel = grpc.secure_channel(address, channel_credentials(tls), CLIENT_OPTIONS)
    else:
        channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
    with channel:
        call = channel.unary_stream(
            _METHOD,
            request_serializer=pb.ReadPartRequest.SerializeToString,
            response_deserializer=pb.ReadPartResponse.FromString,
        )
        try:
            return _gathered(call(request, timeout=timeout_s))
        except (grpc.RpcError, ValueError) as error:
            raise UnavailableError(f"{address} does not give {tensor}: {error}") from error


def _gathered(responses: Any) -> list[np.ndarray]:
    """Puts the arrays together. Raises ValueError if the pieces are not those of the arrays."""
    first = next(iter(responses))
    arrays: list[np.ndarray] = []
    for described in first.arrays:
        if described.dtype not in _DTYPES:
            raise ValueError(f"arrays of {described.dtype}")
        arrays.append(np.empty(tuple(described.shape), _DTYPES[described.dtype]))
    places = [array.reshape(-1).view(np.uint8) for array in arrays]
    index = done = 0
    for response in responses:
        while index < len(places) and done == len(places[index]):
            index, done = index + 1, 0
        piece = np.frombuffer(response.piece, np.uint8)
        if index == len(places) or done + len(piece) > len(places[index]):
            raise ValueError("more bytes than the arrays have")
        places[index][done : done + len(piece)] = piece
        done += len(piece)
    if index < len(places) - 1 or done < len(places[-1]):
        raise ValueError("fewer bytes than the arrays have")
    return arrays
