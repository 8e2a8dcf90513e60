"""Which routers go through the layers side by side, and so whose calls are worth a short wait.

A worker that computes a layer's experts for two routers in one sweep reads their weights once
instead of twice. Routers whose steps take about as long reach the same layer at about the same
time, if the one ahead waits a little at each layer. After that they stay together by themselves.

A pure object: no clock, no arrays.
"""

from dataclasses import dataclass

# After this many fruitless waits in a row, a router is not waited for until it calls again.
MAX_FRUITLESS_WAITS = 4


@dataclass(slots=True)
class _Progress:
    """The layer whose experts a router asked for last."""

    layer: int
    num_fruitless_waits: int = 0


class CoArrival:
    """Where each router is among the layers; a token goes through them again and again.

    Used from one thread, except for `others`, which any thread may ask.

    Invariant: `_callers` names the routers of `_routers` with fewer fruitless waits than the limit.
    It is never changed, but replaced.
    """

    def __init__(self) -> None:
        # As far as calls have shown.
        self._num_layers = 1
        self._routers: dict[str, _Progress] = {}
        self._callers: frozenset[str] = frozenset()

    def came(self, router_id: str, layer: int) -> None:
        """A router asks for experts of a layer."""
        self._num_layers = max(self._num_layers, layer + 1)
        progress = self._routers.setdefault(router_id, _Progress(layer))
        progress.layer, progress.num_fruitless_waits = layer, 0
        if router_id not in self._callers:
            self._callers |= {router_id}

    def left(self, router_id: str) -> None:
        """A router is gone."""
        self._routers.pop(router_id, None)
        self._callers -= {router_id}

    def others(self, router_id: str) -> bool:
        """Whether another router called recently."""
        return not self._callers <= {router_id}

    def awaited(self, router_id: str, layer: int) -> list[str]:
        """The routers behind one that reached a layer, which will reach it soon.

        The layers are a circle: routers less than half of it behind are behind, others are ahead.
        """
        return [
            name
            for name, progress in self._routers.items()
            if name != router_id
            and name in self._callers
            and 0 < (layer - progress.layer) % self._num_layers <= self._num_layers // 2
        ]

    def waited_without_result(self, router_id: str) -> None:
        """A router did not come in time."""
        progress = self._routers.get(router_id)
        if progress is not None:
            progress.num_fruitless_waits += 1
            if progress.num_fruitless_waits >= MAX_FRUITLESS_WAITS:
                self._callers -= {router_id}
