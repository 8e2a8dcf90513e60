"""The reactor: posts, files and timers in one thread, and nothing left when it is closed."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE

import pytest

from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending

MAKERS: dict[str, Callable[[], Reactor]] = {
    "plain": lambda: Reactor(SystemClock()),
    "hosting": lambda: Reactor(SystemClock(), make_loop=AsyncioLoop),
}
TIMEOUT_S = 20.0
both = pytest.mark.parametrize("kind", MAKERS)


@both
def test_task_wakes_by_file_post_and_timer(kind: str) -> None:
    reactor = MAKERS[kind]()
    here, there = socket.socketpair()
    read = Pending[bytes]()
    posted = Pending[str]()

    async def everything() -> tuple[bytes, str]:
        await reactor.tasks.sleep(0.001)
        there.send(b"x")
        return await read, await posted

    def start() -> Pending[tuple[bytes, str]]:
        reactor.register(here.fileno(), EVENT_READ, lambda _: read.resolve(here.recv(9)))
        return reactor.tasks.start(everything())

    reactor.start()
    threading.Timer(0.02, lambda: reactor.post(lambda: posted.resolve("posted"))).start()
    assert reactor.ask(start, TIMEOUT_S) == (b"x", "posted")
    reactor.call(lambda: reactor.unregister(here.fileno()))
    reactor.close()
    here.close()
    there.close()


@both
def test_runs_in_the_calling_thread(kind: str) -> None:
    reactor = MAKERS[kind]()
    threads: list[threading.Thread] = []

    async def note() -> None:
        threads.append(threading.current_thread())
        await reactor.tasks.sleep(0.001)
        reactor.stop()

    reactor.tasks.start(note())
    reactor.run()
    reactor.close()
    assert threads == [threading.current_thread()]


@both
def test_posts_of_many_threads_all_arrive(kind: str) -> None:
    reactor = MAKERS[kind]()
    reactor.start()
    seen: list[int] = []

    def post_many(first: int) -> None:
        for number in range(first, first + 200):
            reactor.post(lambda number=number: seen.append(number))

    threads = [threading.Thread(target=post_many, args=(first,)) for first in range(0, 1000, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reactor.call(lambda: sorted(seen)) == list(range(1000))
    reactor.close()


@both
def test_fault_of_a_callback_is_reported_and_survived(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    faults: list[BaseException] = []
    make_loop = AsyncioLoop if kind == "hosting" else None
    reactor = Reactor(SystemClock(), make_loop=make_loop, on_fault=faults.append)
    reactor.start()

    def fail() -> None:
        raise RuntimeError("a fault")

    with caplog.at_level(logging.ERROR):
        reactor.post(fail)
        assert reactor.call(lambda: 1) == 1
    assert [str(fault) for fault in faults] == ["a fault"]
    assert "a callback failed" in caplog.text
    reactor.close()


def test_error_of_a_call_reaches_who_asked() -> None:
    reactor = Reactor(SystemClock())
    reactor.start()

    def fail() -> int:
        raise KeyError("nothing")

    with pytest.raises(KeyError):
        reactor.call(fail)
    with pytest.raises(TimeoutError):
        reactor.ask(lambda: Pending[int](), 0.01)
    reactor.close()


def test_events_of_a_file_can_be_changed() -> None:
    reactor = Reactor(SystemClock())
    here, there = socket.socketpair()
    ready = Pending[int]()

    def start() -> Pending[int]:
        reactor.register(here.fileno(), EVENT_READ, ready.resolve)
        reactor.modify(here.fileno(), EVENT_WRITE)
        return ready

    reactor.start()
    assert reactor.ask(start, TIMEOUT_S) == EVENT_WRITE
    reactor.call(lambda: reactor.unregister(here.fileno()))
    reactor.close()
    here.close()
    there.close()


def test_hosted_loop_and_tasks_wake_each_other() -> None:
    reactor = MAKERS["hosting"]()

    async def in_loop(number: int) -> int:
        await asyncio.sleep(0.001)
        return number + 1

    async def in_tasks() -> int:
        number = 0
        for _ in range(20):
            number = await reactor.run_in_loop(in_loop(number))
            await reactor.tasks.sleep(0.0)
        return number

    reactor.start()
    assert reactor.ask(lambda: reactor.tasks.start(in_tasks()), TIMEOUT_S) == 20
    reactor.close()


def test_closing_ends_what_still_runs_in_the_loop() -> None:
    reactor = MAKERS["hosting"]()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("ended")

    reactor.start()
    never = reactor.call(lambda: reactor.run_in_loop(wait()))
    reactor.call(lambda: None)
    reactor.close()
    assert ended == ["ended"] and isinstance(never.error, asyncio.CancelledError)


@both
def test_nothing_is_left_when_it_is_closed(kind: str) -> None:
    num_files = len(os.listdir("/proc/self/fd"))
    for is_started in (True, False):
        reactor = MAKERS[kind]()
        if is_started:
            reactor.start()
        reactor.close()
        reactor.close()
        reactor.post(lambda: None)
    assert len(os.listdir("/proc/self/fd")) == num_files
    assert threading.active_count() == len(threading.enumerate())
    assert "reactor" not in [thread.name for thread in threading.enumerate()]
