"""The metrics of one ingress replica, for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from milliways.router.requests.sequence import TokenEvent

_FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class IngressMetrics:
    """The metrics of one ingress replica, in a registry of their own: modules hold no state."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._requests = Counter(
            "milliways_requests",
            "Requests that ended.",
            ("surface", "model", "code"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "milliways_tokens",
            "Prompt tokens and generated tokens.",
            ("kind",),
            registry=self.registry,
        )
        # Found once: it takes as long as all else that a token costs here.
        self._tokens_of = {kind: self._tokens.labels(kind) for kind in ("prompt", "completion")}
        self.hedges = Counter(
            "milliways_hedged_requests",
            "Requests sent to a second router because the first was silent.",
            registry=self.registry,
        )
        self._first_token = Histogram(
            "milliways_time_to_first_token_seconds",
            "Time from the start of a request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "milliways_time_per_output_token_seconds",
            "Mean time for each token of a sample after its first token.",
            buckets=_PER_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.ongoing = Gauge(
            "milliways_ongoing_requests", "Requests in progress.", registry=self.registry
        )

    def count_request(self, surface: str, model: str, code: str) -> None:
        self._requests.labels(surface, model, code).inc()

    def count_tokens(self, kind: str, count: int) -> None:
        self._tokens_of[kind].inc(count)

    def watch(self, num_prompt_tokens: int) -> "TokenWatch":
        """Begins to time the tokens of one request."""
        return TokenWatch(self, self._first_token, self._per_token, num_prompt_tokens)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class TokenWatch:
    """Times the tokens of one request.

    *Invariant:* `_first_s` and `_num_later` have the same keys, the choices that have a token.
    """

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
        # Of each choice: the time of its first token, and the number of later tokens.
        self._first_s: dict[int, float] = {}
        self._num_later: dict[int, int] = {}

    def record_prompt(self) -> None:
        """Counts the prompts' tokens, at the first result of the request."""
        if not self._has_begun:
            self._has_begun = True
            self._metrics.count_tokens("prompt", self._num_prompt_tokens)

    def record(self, choice_index: int, event: TokenEvent) -> None:
        """Records a token of a choice."""
        now_s = self._metrics.clock()
        self.record_prompt()
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
