"""Answers a request that cannot be decoded with INVALID_ARGUMENT; gRPC alone answers UNKNOWN."""

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from milliways.model.errors import InvalidRequestError
from milliways.wire.status_codes import status_of

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class MalformedRequestInterceptor(aio.ServerInterceptor):
    """Wraps the handlers of methods that take a single message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        # Any: which attributes a handler has depends on the kind of its method.
        handler = cast(Any, await continuation(handler_call_details))
        if handler is None or handler.request_streaming:
            return handler
        behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
        if inspect.isasyncgenfunction(behavior):
            return handler
        make = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            _refusing_errors(behavior),
            request_deserializer=_message_or_error(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _message_or_error(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError as error:
            return error

    return decode


def _refusing_errors(behavior: Callable[..., Any]) -> Callable[..., Any]:
    async def answer(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, DecodeError):
            fault = InvalidRequestError("request", "malformed", "a message of the method's type")
            status = status_of(fault)
            await context.abort(
                grpc.StatusCode[status.code], status.message, status.trailing_metadata
            )
        return await behavior(request, context)

    return answer
