"""The catalogue of what can go wrong."""

from enum import Enum


class Fault(Enum):
    """One thing that goes wrong, once, at a time, to somebody that a seed picks."""

    # A process ends: one without a router, one of a router's chain, one with a router.
    KILL_EXPERTS = "kill-experts"
    KILL_ATTENTION = "kill-attention"
    KILL_ROUTER = "kill-router"
    # A process stands still and wakes up: unnoticed, or after it was replaced.
    FREEZE = "freeze"
    REPLACE_FROZEN = "replace-frozen"
    # From now on everything that a worker computes takes long.
    SLOW = "slow"
    # A reply is lost although the stream stands; a stream breaks; a stream stands still.
    DROP_REPLY = "drop-reply"
    CUT_LINK = "cut-link"
    STALL_LINK = "stall-link"
    # Workers know of a new epoch long before the routers do.
    STALE_EPOCH = "stale-epoch"
    # A worker refuses, or fails to compute, for a while.
    REFUSE_OVERLOADED = "refuse-overloaded"
    REFUSE_EXPIRED = "refuse-expired"
    FAIL_ONCE = "fail-once"
    # The ingress takes a router for silent, rightly or not, and has another one do the same.
    SILENCE = "silence"
