"""Which routers go through the layers side by side, and so whose calls are worth a short wait.

A worker that computes a layer's experts for two routers in one sweep reads their weights once
instead of twice. Routers whose steps take about as long come to the same layer at about the same
time, if whoever is ahead waits a little at each layer; then they stay together by themselves.

A pure object: no clock, no arrays.
"""

from dataclasses import dataclass

# A router that was waited for in vain so often in a row is not, until it calls again.
MAX_VAIN_WAITS = 4


@dataclass(slots=True)
class _Progress:
    """The layer whose experts a router asked for last."""

    layer: int
    num_vain_waits: int = 0


class CoArrival:
    """Where each router is among the layers; a token goes through them again and again."""

    def __init__(self) -> None:
        # As far as calls have shown.
        self._num_layers = 1
        self._routers: dict[str, _Progress] = {}

    def came(self, router_id: str, layer: int) -> None:
        """A router asks for experts of a layer."""
        self._num_layers = max(self._num_layers, layer + 1)
        progress = self._routers.setdefault(router_id, _Progress(layer))
        progress.layer, progress.num_vain_waits = layer, 0

    def left(self, router_id: str) -> None:
        """A router is gone."""
        self._routers.pop(router_id, None)

    def others(self, router_id: str) -> bool:
        """Whether another router calls these days; any thread may ask."""
        return any(
            name != router_id and progress.num_vain_waits < MAX_VAIN_WAITS
            for name, progress in list(self._routers.items())
        )

    def awaited(self, router_id: str, layer: int) -> list[str]:
        """Who is behind a router that has come to a layer, and so will come there soon.

        The layers are a circle: who is less than half of it behind is behind, others are ahead.
        """
        return [
            name
            for name, progress in list(self._routers.items())
            if name != router_id
            and progress.num_vain_waits < MAX_VAIN_WAITS
            and 0 < (layer - progress.layer) % self._num_layers <= self._num_layers // 2
        ]

    def waited_without_result(self, router_id: str) -> None:
        """It did not come in time."""
        progress = self._routers.get(router_id)
        if progress is not None:
            progress.num_vain_waits += 1
