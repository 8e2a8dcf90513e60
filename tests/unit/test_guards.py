"""The guards that conftest sets, seen to bite."""

import asyncio
import socket

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from milliways.model.ops import PureOps


def test_unit_test_cannot_open_a_network_socket() -> None:
    with pytest.raises(Exception, match="AF_INET socket in a unit test"):
        socket.create_connection(("127.0.0.1", 9))


def test_event_loop_still_works_in_a_unit_test() -> None:
    assert asyncio.run(asyncio.sleep(0, "done")) == "done"


def test_array_of_another_shape_than_annotated_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="scale_D"):
        PureOps().rms_norm(jnp.zeros((3, 4)), jnp.zeros(5))


def test_dtypes_do_not_mix_by_accident() -> None:
    with pytest.raises(Exception, match="Input dtypes"):
        jnp.zeros(2, jnp.float32) + jnp.zeros(2, jnp.bfloat16)


def test_ranks_do_not_mix_by_accident() -> None:
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.zeros((2, 2)) + jnp.zeros(2)
