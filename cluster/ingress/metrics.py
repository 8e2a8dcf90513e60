"""What the ingress counts, for Prometheus. A registry of its own: no state of a module."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from milliways.router.requests.sequence import TokenEvent

_FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class IngressMetrics:
    """The counters of one ingress replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._requests = Counter(
            "milliways_requests",
            "Requests answered.",
            ("surface", "model", "code"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "milliways_tokens", "Tokens taken in and given out.", ("kind",), registry=self.registry
        )
        self.hedges = Counter(
            "milliways_hedged_requests",
            "Requests asked of another router as well, because theirs was silent.",
            registry=self.registry,
        )
        self._first_token = Histogram(
            "milliways_time_to_first_token_seconds",
            "From a request's start to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "milliways_time_per_output_token_seconds",
            "Mean time of a sample's tokens after its first.",
            buckets=_PER_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.ongoing = Gauge(
            "milliways_ongoing_requests", "Requests running now.", registry=self.registry
        )

    def count_request(self, surface: str, model: str, code: str) -> None:
        self._requests.labels(surface, model, code).inc()

    def count_tokens(self, kind: str, count: int) -> None:
        self._tokens.labels(kind).inc(count)

    def watch(self, num_prompt_tokens: int) -> "TokenWatch":
        """Times one request's tokens from now on."""
        return TokenWatch(self, self._first_token, self._per_token, num_prompt_tokens)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class TokenWatch:
    """Times the tokens of one request."""

    def __init__(
        self,
        metrics: IngressMetrics,
        first_token: Histogram,
        per_token: Histogram,
        num_prompt_tokens: int,
    ) -> None:
        self._metrics = metrics
        self._first_token = first_token
        self._per_token = per_token
        self._num_prompt_tokens = num_prompt_tokens
        self._started_s = metrics.clock()
        self._has_begun = False
        # Of each choice: when its first token came, and how many came after it.
        self._first_s: dict[int, float] = {}
        self._num_later: dict[int, int] = {}

    def note_prompt(self) -> None:
        """Something came of the prompts, which are counted once."""
        if not self._has_begun:
            self._has_begun = True
            self._metrics.count_tokens("prompt", self._num_prompt_tokens)

    def note(self, choice_index: int, event: TokenEvent) -> None:
        """A token of a choice came."""
        now_s = self._metrics.clock()
        self.note_prompt()
        if not self._first_s:
            self._first_token.observe(now_s - self._started_s)
        if choice_index in self._first_s:
            self._num_later[choice_index] += 1
        else:
            self._first_s[choice_index] = now_s
            self._num_later[choice_index] = 0
        self._metrics.count_tokens("completion", 1)
        num_later = self._num_later[choice_index]
        if event.finish_reason is not None and num_later:
            self._per_token.observe((now_s - self._first_s[choice_index]) / num_later)
