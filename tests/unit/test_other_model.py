"""An ingress serves no view of another model than its own: it is not ready, and says why."""

import asyncio
import warnings

import pytest

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.wire.errors import UnavailableError
from milliways.wire.view import ClusterView, Declared, Member, WorkerState
from tests.conftest import REPOSITORY
from tests.ingresses import demo_model
from tests.sources import CountingSource

with warnings.catch_warnings():
    # Ray defines its models as pydantic once liked it; that is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from milliways.cluster.ray.app import Directory

CONFIG = ClusterConfig()
MINI8 = str(REPOSITORY / "tests" / "golden" / "mini8")


def view_of(config: ClusterConfig) -> ClusterView:
    """A view of a worker that serves under these settings."""
    member = Member(
        worker_id="worker-0",
        incarnation=1,
        address="a",
        router_address="b",
        state=WorkerState.READY,
    )
    return ClusterView(
        placement_epoch=1,
        members={"worker-0": member},
        chains={"worker-0": ("worker-0",)},
        declared=Declared(values=flat(config), at_s=1.0),
        manifest_is_whole=True,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("model.path", MINI8), ("model.name", "other"), ("model.dtype", "bfloat16")]
)
def test_ingress_of_another_model_takes_no_routers(name: str, value: str) -> None:
    directory = Directory(changed(CONFIG, {name: value}), declared_at_s=2.0)
    directory._take(view_of(CONFIG))
    assert directory.routers() == []
    own, running = repr(value), repr(flat(CONFIG)[name])
    says = f"another model is served: {name} is {own} here and {running} in the cluster"
    assert directory.obstacle == says


def test_ingress_of_the_same_model_takes_routers_whatever_else_differs() -> None:
    directory = Directory(changed(CONFIG, {"workers.count": 5}), declared_at_s=2.0)
    directory._take(view_of(CONFIG))
    assert [router.worker_id for router in directory.routers()] == ["worker-0"]
    assert directory.obstacle == ""


def test_obstacle_refuses_requests_and_readiness_with_its_reason() -> None:
    async def run() -> None:
        source = CountingSource()
        ingress = Ingress(demo_model(), source, obstacle=lambda: "another model is served")
        with pytest.raises(UnavailableError, match="another model"), ingress.admit():
            pass
        with pytest.raises(UnavailableError, match="another model"):
            await ingress.readiness.check()

    asyncio.run(run())
