"""What a router makes of a request's message."""

import pytest

from milliways.model.errors import InvalidRequestError
from milliways.router.server import routed_request
from milliways.v1 import router_pb2, sampling_pb2


def message(**sampling: int) -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(
        prompt_token_ids=[5],
        max_tokens=4,
        num_samples=2,
        sampling=sampling_pb2.SamplingParams(**sampling),
        delivered=[
            router_pb2.DeliveredTokens(sample_index=1, token_ids=[7, 8], is_finished=True),
        ],
    )


def test_delivered_tokens_and_ends_are_taken_over() -> None:
    routed = routed_request(message(seed=0), 60.0)
    assert (routed.delivered, routed.finished) == ({1: (7, 8)}, {1})
    assert (routed.request.sampling.seed, routed.timeout_s) == (0, 60.0)


def test_seed_has_to_be_told() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        routed_request(message(), 60.0)
    assert caught.value.field == "sampling.seed"
