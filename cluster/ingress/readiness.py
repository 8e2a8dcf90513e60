"""Finds out whether a token can be made now. All callers share one probe, cached for a second."""

import asyncio
import logging
import time
from collections.abc import Callable

from milliways.cluster.ingress.token_source import TokenSource
from milliways.wire.errors import ClusterError, UnavailableError

logger = logging.getLogger(__name__)

CACHED_FOR_S = 1.0
# A probe that takes longer has failed: no token can be made now.
PROBE_TIMEOUT_S = 10.0


class Readiness:
    """Probes the source of tokens on demand, at most once a second.

    *Invariant:* at most one probe runs at a time. Once `drain` was called, `check` always raises.
    """

    def __init__(
        self,
        source: TokenSource,
        clock: Callable[[], float] = time.monotonic,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
        obstacle: Callable[[], str] = lambda: "",
    ) -> None:
        """`obstacle` says why no request can be served here, and is empty if one can."""
        self._obstacle = obstacle
        self._source = source
        self._clock = clock
        self._probe_timeout_s = probe_timeout_s
        self._reason: str | None = None
        self._good_until_s = float("-inf")
        self._probe: asyncio.Task[str | None] | None = None
        self._draining_reason: str | None = None
        self._drains = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining_reason is not None

    def drain(self, reason: str) -> None:
        """Makes `check` fail from now on, with this reason."""
        self._draining_reason = reason
        self._drains.set()

    async def wait_for_drain(self, timeout_s: float) -> None:
        """Returns when `drain` is called, or after this time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._drains.wait()
        except TimeoutError:
            pass

    async def check(self) -> None:
        """Returns if a token can be made.

        Raises:
            UnavailableError: no token can be made; says why.
        """
        reason = self._draining_reason or self._obstacle() or await self._cached()
        if reason is not None:
            raise UnavailableError(reason)

    async def _cached(self) -> str | None:
        if self._clock() < self._good_until_s:
            return self._reason
        if self._probe is None:
            self._probe = asyncio.create_task(self._run_probe(), name="readiness probe")
        # Shielded: other callers may wait for the same probe.
        return await asyncio.shield(self._probe)

    async def _run_probe(self) -> str | None:
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await self._source.probe()
            self._reason = None
        except TimeoutError:
            self._reason = f"no token within {self._probe_timeout_s:g} s"
        except ClusterError as error:
            self._reason = str(error)
        except Exception:
            # Catches all: whatever is wrong with the source, it makes no tokens.
            logger.exception("readiness probe failed")
            self._reason = "the probe failed"
        finally:
            self._good_until_s = self._clock() + CACHED_FOR_S
            self._probe = None
        return self._reason
