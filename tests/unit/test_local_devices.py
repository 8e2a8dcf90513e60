"""What a worker tells JAX of its GPUs."""

import pytest

from milliways.cluster.host.local_devices import tell_jax

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("gpus_each", "expected"),
    [
        (0, {"JAX_PLATFORMS": "cpu"}),
        (0.5, {FRACTION: "0.3750"}),
        (0.25, {FRACTION: "0.1875"}),
        (1, {}),
        (8, {}),
    ],
)
def test_a_worker_takes_what_it_was_given(gpus_each: float, expected: dict[str, str]) -> None:
    environment: dict[str, str] = {}
    tell_jax(gpus_each, environment)
    assert environment == expected


def test_what_the_operator_set_stays() -> None:
    environment = {"JAX_PLATFORMS": "tpu", FRACTION: "0.9"}
    before = dict(environment)
    tell_jax(0, environment)
    tell_jax(0.5, environment)
    assert environment == before
