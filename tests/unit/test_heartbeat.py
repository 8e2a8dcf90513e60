"""A silent Ray is noticed, and one that stumbles is waited for."""

import pytest

from milliways.cluster.ray.heartbeat import Heartbeat
from milliways.wire.errors import RayGoneError


class Asked:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.error: Exception | None = None

    def ask(self) -> None:
        if self.error is not None:
            raise self.error


def test_silence_counts_from_the_last_answer() -> None:
    asked = Asked()
    heartbeat = Heartbeat(asked.ask, 1.0, lambda: asked.now_s)
    asked.now_s = 30.0
    heartbeat.beat()
    asked.error = RuntimeError("it starts again\nand more")
    asked.now_s = 70.0
    heartbeat.beat()
    heartbeat.check(50.0)
    asked.now_s = 81.0
    with pytest.raises(RayGoneError, match=r"silent for 51 s: it starts again$"):
        heartbeat.check(50.0)
    asked.error = None
    heartbeat.beat()
    heartbeat.check(50.0)


def test_one_that_is_known_to_be_gone_is_not_waited_for() -> None:
    asked = Asked()
    heartbeat = Heartbeat(asked.ask, 1.0, lambda: asked.now_s)
    asked.error = RayGoneError("no node")
    heartbeat.beat()
    with pytest.raises(RayGoneError, match="no node"):
        heartbeat.check(50.0)
