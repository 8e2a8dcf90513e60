"""The kinds of faults in random simulations."""

from enum import Enum


class Fault(Enum):
    """One kind of fault. It happens once, at a given time, to a process that a seed picks."""

    # A process dies: one without a router, one of a router's chain, or one with a router.
    KILL_EXPERTS = "kill-experts"
    KILL_ATTENTION = "kill-attention"
    KILL_ROUTER = "kill-router"
    # A process freezes and wakes up: unnoticed, or after it was replaced.
    FREEZE = "freeze"
    REPLACE_FROZEN = "replace-frozen"
    # From now on a worker computes slowly.
    SLOW = "slow"
    # A reply is lost although the stream stays open; a stream breaks; a stream stalls.
    DROP_REPLY = "drop-reply"
    CUT_LINK = "cut-link"
    STALL_LINK = "stall-link"
    # A worker knows a new epoch long before the routers do.
    STALE_EPOCH = "stale-epoch"
    # A worker refuses calls for a while, or fails to compute one.
    REFUSE_OVERLOADED = "refuse-overloaded"
    REFUSE_EXPIRED = "refuse-expired"
    FAIL_ONCE = "fail-once"
    # The ingress considers a router silent, rightly or not, and hedges its requests.
    SILENCE = "silence"
