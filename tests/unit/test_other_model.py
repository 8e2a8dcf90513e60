"""An ingress serves no view of another model than its own: it is not ready, and says why."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.model.demo import DEMO_DIR
from milliways.model.small_files import SmallFiles
from milliways.wire.errors import ChangeRefusedError, UnavailableError
from milliways.wire.view import ClusterView, Declared, Member, WorkerState
from tests.ingresses import demo_model
from tests.sources import CountingSource

with warnings.catch_warnings():
    # Ray defines its models as pydantic once liked it; that is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from milliways.cluster.ray import app
    from milliways.cluster.ray.app import Directory

CONFIG = ClusterConfig()
OTHER = changed(CONFIG, {"model.name": "other"})


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
    ("name", "value"), [("model.path", "/m"), ("model.name", "other"), ("model.dtype", "bfloat16")]
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


class FakeController:
    """What a replica asks; a generation of its own is complete after it has asked three times."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.refusal = refusal
        self.files: SmallFiles | None = None
        self.fails: Exception | None = None

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def remote(*arguments: Any) -> Any:
            await asyncio.sleep(0)
            self.asked.append(method)
            return self._answer(method, arguments)

        return SimpleNamespace(remote=remote)

    def _answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        is_complete = self.asked.count("prepare") == 3
        if self.fails is not None:
            raise self.fails
        match method:
            case "small_files":
                return self.files
            case "prepare" if self.refusal is not None:
                raise RayTaskError("prepare", "its traceback", self.refusal)
            case "prepare":
                return SimpleNamespace(is_complete=is_complete, serves=False)
            case "view":
                self.follower = arguments[2]
                return replace(view_of(OTHER if is_complete else CONFIG), generation=2)
        return None


async def joined(monkeypatch: pytest.MonkeyPatch, controller: FakeController) -> Directory:
    """A directory of a replica of another model, when it knows whether it has workers."""
    directory = Directory(OTHER, declared_at_s=2.0)
    monkeypatch.setattr(directory, "controller", lambda: controller)
    follower = asyncio.create_task(directory.follow())
    try:
        async with asyncio.timeout(30):
            await directory.joined()
            await directory.changed()
    finally:
        follower.cancel()
    return directory


def test_replica_waits_until_the_workers_of_its_model_are_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        controller = FakeController()
        directory = await joined(monkeypatch, controller)
        assert controller.asked[:6] == ["begin", "declare", *["prepare"] * 3, "declare"]
        assert controller.follower.values == flat(OTHER)
        assert [router.worker_id for router in directory.routers()] == ["worker-0"]

    asyncio.run(run())


def test_replica_without_workers_of_its_model_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        controller = FakeController(ChangeRefusedError("no room for 3 workers"))
        with pytest.raises(UnavailableError, match="no room for 3 workers"):
            await joined(monkeypatch, controller)

    asyncio.run(run())


def test_replica_takes_the_files_that_workers_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = FakeController()
        monkeypatch.setattr(app, "find_or_start_controller", lambda config, at_s: controller)
        controller.files = SmallFiles.read(DEMO_DIR)
        assert await app.known_files(CONFIG, 2.0) == controller.files
        assert controller.asked == ["begin", "small_files"]
        controller.fails = RayTaskError("begin", "its traceback", UnavailableError("not begun"))
        # Its own files count then.
        assert await app.known_files(CONFIG, 2.0) is None

    asyncio.run(run())


def test_refusal_without_a_reason_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        with pytest.raises(UnavailableError):
            await joined(monkeypatch, FakeController(ChangeRefusedError("")))

    asyncio.run(run())


def test_replica_follows_only_once_it_has_been_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = FakeController()
        directory = Directory(OTHER, declared_at_s=2.0)
        monkeypatch.setattr(directory, "controller", lambda: controller)
        follower = asyncio.create_task(directory.follow())
        async with asyncio.timeout(30):
            await directory.changed()
            assert not controller.follower.is_healthy
            directory.is_healthy = True
            while not controller.follower.is_healthy:
                await asyncio.sleep(0)
        follower.cancel()

    asyncio.run(run())


def test_replica_that_leaves_prepares_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = FakeController()
        directory = Directory(OTHER, declared_at_s=2.0)
        monkeypatch.setattr(directory, "controller", lambda: controller)
        monkeypatch.setattr(app, "find_controller", lambda: controller)
        follower = asyncio.create_task(directory.follow())
        async with asyncio.timeout(30):
            while "prepare" not in controller.asked:
                await asyncio.sleep(0)
            await directory.leave()
            await follower
        assert controller.asked.count("prepare") < 3
        assert "view" not in controller.asked
        with pytest.raises(UnavailableError, match="leaves"):
            await directory.joined()

    asyncio.run(run())


def test_view_of_another_generation_is_taken_whatever_its_epoch() -> None:
    directory = Directory(OTHER, declared_at_s=2.0)
    directory._take(replace(view_of(CONFIG), placement_epoch=9))
    assert directory.routers() == []
    directory._take(replace(view_of(OTHER), generation=2))
    assert [router.worker_id for router in directory.routers()] == ["worker-0"]
