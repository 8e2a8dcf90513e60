"""Tasks inside an asyncio loop: a service that fails is reported, and the others go on."""

import asyncio

import pytest

from milliways.runtime import fatal
from milliways.runtime.async_tasks import AsyncTasks


def test_a_service_that_fails_is_reported_and_the_others_go_on() -> None:
    async def main() -> None:
        faults: list[BaseException] = []
        shell = AsyncTasks(faults.append)
        ticks: list[int] = []

        async def tick() -> None:
            while True:
                await shell.tasks.sleep(0.01)
                ticks.append(len(ticks))

        async def fail() -> None:
            await shell.tasks.sleep(0.02)
            raise ValueError("a bug")

        shell.tasks.start_service(tick())
        shell.tasks.start_service(fail())
        shell.kick()
        async with asyncio.timeout(20.0):
            while not faults:
                await asyncio.sleep(0.01)
            num_before = len(ticks)
            while len(ticks) < num_before + 3:
                await asyncio.sleep(0.01)
        assert [str(fault) for fault in faults] == ["a bug"]
        shell.tasks.close()

    asyncio.run(main())


def test_a_fault_ends_the_process_with_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    fatal.end_process(ValueError("a bug"))
    assert codes == [fatal.EXIT_FAULT] != [0]
