"""How long a peer may be silent before another one is asked as well.

Routers learn it for each worker (`router.links.link_table`), ingress replicas for each router
(`cluster.ingress.silence`). Both wait a multiple of the longest recent delay, within limits. Pure:
times are arguments.
"""


class LatencyEstimate:
    """The longest recent delay of a peer. Old delays fade as new ones are observed.

    Invariant: `longest_s` is None until the first delay that counts, and a number after it.
    """

    __slots__ = ("longest_s",)

    def __init__(self) -> None:
        self.longest_s: float | None = None

    def observe(self, delay_s: float, *, fading: float, counts: bool) -> None:
        """Takes in a delay, after multiplying the older ones by `fading`.

        A delay does not count if the peer was already called silent: a process that was frozen is
        no slower than before.
        """
        if self.longest_s is not None:
            self.longest_s *= fading
        if counts:
            self.raise_to(delay_s)

    def raise_to(self, delay_s: float) -> None:
        """Makes the estimate at least this long."""
        self.longest_s = max(delay_s, self.longest_s or 0.0)


def patience_s(
    longest_s: float | None, *, multiple: float, first_s: float, least_s: float, most_s: float
) -> float:
    """How long to wait for a peer: `first_s` if nothing is known of it."""
    wanted_s = first_s if longest_s is None else multiple * longest_s
    return min(max(wanted_s, least_s), most_s)
