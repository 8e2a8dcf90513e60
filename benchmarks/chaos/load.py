"""The load: threads that send one request after another over HTTP and gRPC."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from milliways.benchmarks.chaos.answers import Answer, Outcome
from milliways.benchmarks.chaos.clients import AnswerError, Client
from milliways.benchmarks.chaos.requests import ChaosRequest, Surface


class Load:
    """Clients that send the same requests again and again until they are stopped.

    Invariant: `_outcomes` has one entry for each request that ended since the last `stop`.
    """

    def __init__(
        self, requests: Sequence[ChaosRequest], clients: dict[Surface, Client], num_clients: int
    ) -> None:
        self._requests = requests
        self._clients = clients
        self._num_clients = num_clients
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        # By the client's thread.
        self._running: dict[int, Answer] = {}
        self._wanted: Mapping[int, Answer] | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    @property
    def num_ended(self) -> int:
        """How many requests ended since the last `stop`."""
        return len(self._outcomes)

    def begin_no_more(self) -> None:
        """Has the clients send no further request; those that run go on."""
        with self._lock:
            self._stopped.set()

    def begin_no_more_if_all_have_a_token(self) -> bool:
        """As `begin_no_more`, if requests run and each has its first token; whether that is so."""
        with self._lock:
            running = self._running.values()
            if not running or not all(answer.token_times_s for answer in running):
                return False
            self._stopped.set()
            return True

    def run_once(self) -> list[Outcome]:
        """Sends every request once; outcomes are in the order of the requests."""
        self._begin(iter(range(len(self._requests))))
        return sorted(self.stop(at_once=False), key=lambda outcome: outcome.request_index)

    def start(self, wanted: Mapping[int, Answer] | None = None) -> None:
        """Starts the clients. With `wanted`, each answer is compared as soon as it is complete."""
        self._wanted = wanted
        count = len(self._requests)
        self._begin(number % count for number in _naturals())

    def stop(self, *, at_once: bool = True) -> list[Outcome]:
        """Waits for the running requests; returns all outcomes.

        With `at_once`, no further request is sent. Otherwise the clients send all that are left.
        """
        if at_once:
            self.begin_no_more()
        for thread in self._threads:
            thread.join()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _begin(self, indices: Iterator[int]) -> None:
        self._stopped.clear()
        self._threads = [
            threading.Thread(target=self._work, args=(indices,), name=f"client-{i}", daemon=True)
            for i in range(self._num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, indices: Iterator[int]) -> None:
        while True:
            with self._lock:
                index = None if self._stopped.is_set() else next(indices, None)
                if index is None:
                    return
                answer = Answer.of(self._requests[index])
                self._running[threading.get_ident()] = answer
            outcome = self._send(index, answer)
            if self._wanted is not None:
                # The tokens of a run of an hour would not fit into memory.
                outcome = outcome.compared(self._wanted)
            with self._lock:
                self._outcomes.append(outcome)
                del self._running[threading.get_ident()]

    def _send(self, index: int, answer: Answer) -> Outcome:
        request = self._requests[index]
        started_s, error = time.monotonic(), ""
        try:
            self._clients[request.surface].send(request, answer)
            if not answer.is_complete:
                error = "the stream ended before the answer"
        except (AnswerError, ValueError, KeyError, IndexError) as problem:
            error = str(problem) or type(problem).__name__
        return Outcome(
            request_index=index,
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
