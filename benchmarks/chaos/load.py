"""The load: threads that ask over HTTP and gRPC, one request after another; all is kept."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from milliways.benchmarks.chaos.answers import Answer, Heard
from milliways.benchmarks.chaos.asks import Ask, Surface
from milliways.benchmarks.chaos.clients import AnswerError, Client


class Load:
    """Some clients, who ask the same requests over and over until they are stopped."""

    def __init__(self, asks: Sequence[Ask], clients: dict[Surface, Client], at_a_time: int) -> None:
        self._asks = asks
        self._clients = clients
        self._at_a_time = at_a_time
        self._lock = threading.Lock()
        self._heard: list[Heard] = []
        self._wanted: Mapping[int, Answer] | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    @property
    def num_heard(self) -> int:
        """Requests that ended."""
        return len(self._heard)

    def run_once(self) -> list[Heard]:
        """Every request once, in the order of the requests."""
        self._begin(iter(range(len(self._asks))))
        return sorted(self.stop(at_once=False), key=lambda heard: heard.ask_index)

    def start(self, wanted: Mapping[int, Answer] | None = None) -> None:
        """Asks over and over; answers are compared as they come where it is said with what."""
        self._wanted = wanted
        count = len(self._asks)
        self._begin(number % count for number in _naturals())

    def stop(self, *, at_once: bool = True) -> list[Heard]:
        """Waits until what was begun has ended; all that was heard."""
        if at_once:
            self._stopped.set()
        for thread in self._threads:
            thread.join()
        heard, self._heard = self._heard, []
        return heard

    def _begin(self, indices: Iterator[int]) -> None:
        self._stopped.clear()
        self._threads = [
            threading.Thread(target=self._work, args=(indices,), name=f"client-{i}", daemon=True)
            for i in range(self._at_a_time)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, indices: Iterator[int]) -> None:
        while not self._stopped.is_set():
            with self._lock:
                index = next(indices, None)
            if index is None:
                return
            heard = self._ask(index)
            if self._wanted is not None:
                # An hour of tokens would be more than anybody has room for.
                heard = heard.judged(self._wanted)
            with self._lock:
                self._heard.append(heard)

    def _ask(self, index: int) -> Heard:
        ask = self._asks[index]
        answer = Answer.of(ask)
        started_s, error = time.monotonic(), ""
        try:
            self._clients[ask.surface].ask(ask, answer)
            if not answer.is_complete:
                error = "the stream ended before the answer"
        except (AnswerError, ValueError, KeyError, IndexError) as problem:
            error = str(problem) or type(problem).__name__
        return Heard(
            ask_index=index,
            started_s=started_s,
            ended_s=time.monotonic(),
            answer=answer,
            error=error,
        )


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
