"""A process that runs one worker after another, controlled through a pipe.

Starting Python and JAX takes seconds, so tests reuse these processes for the next cluster. They
replace a process that was killed.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from milliways.cluster.settings.config import LOOPBACK, ClusterConfig
from milliways.model.small_files import SmallFiles
from milliways.wire.placement import ModelBytes
from tests.served_cluster import REPOSITORY, child_environment

EXIT_FAULT = 70
NUM_THREADS = 8
# (number of the call, its value, its error)
Answer = tuple[int, Any, str]


class WorkerHost:
    """The process, seen from its parent. Answers arrive in a separate thread."""

    def __init__(
        self, folder: Path, gone: Callable[["WorkerHost"], None], num_devices: int = 1
    ) -> None:
        ours, theirs = Pipe()
        self._pipe = ours
        self._gone = gone
        self._answers: dict[int, Callable[[Any, str], None]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.worker_host",
                str(theirs.fileno()),
                str(num_devices),
            ],
            cwd=REPOSITORY,
            env=child_environment(folder),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._thread = threading.Thread(target=self._listen, name="worker-host", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any, then: Callable[[Any, str], None]) -> None:
        """Calls a method; `then` receives its value and "", or None and an error text."""
        with self._lock:
            self._number += 1
            self._answers[self._number] = then
            with suppress(OSError):
                self._pipe.send((self._number, method, arguments))
                return
        self._answer((self._number, None, "the process has ended"))

    def end(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._pipe.close()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._answer(self._pipe.recv())
        self._gone(self)
        with self._lock:
            numbers = list(self._answers)
        for number in numbers:
            self._answer((number, None, "the process has ended"))

    def _answer(self, answer: Answer) -> None:
        number, value, error = answer
        with self._lock:
            then = self._answers.pop(number, None)
        if then is not None:
            then(value, error)


class _Host:
    """The process itself."""

    def __init__(self, pipe: Connection, num_devices: int) -> None:
        self._pipe = pipe
        self._num_devices = num_devices
        self._sending = threading.Lock()
        self._worker: Any = None

    def run(self) -> None:
        with ThreadPoolExecutor(NUM_THREADS) as pool, suppress(EOFError):
            while True:
                pool.submit(self._answer, *self._pipe.recv())

    def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer: Answer = (number, self._do(method, arguments), "")
        except Exception as error:
            answer = (number, None, f"{type(error).__name__}: {error}")
        with self._sending, suppress(OSError):
            self._pipe.send(answer)

    def _do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "spawn":
            return self._spawn(*arguments)
        worker = self._worker
        if method == "stop":
            self._worker = None
        return getattr(worker, method)(*arguments)

    def _spawn(
        self,
        config: ClusterConfig,
        worker_id: str,
        incarnation: int,
        sizes: ModelBytes,
        small_files: SmallFiles | None,
    ) -> Any:
        # Not before: importing it is most of what a process like this costs.
        import jax

        from milliways.cluster.host.worker_process import WorkerProcess

        assert self._worker is None
        devices = jax.local_devices()[: self._num_devices]
        self._worker = WorkerProcess(
            config,
            worker_id,
            incarnation,
            LOOPBACK,
            _exit,
            devices=devices,
            sizes=sizes,
            small_files=small_files,
        )
        return self._worker.start()


def _exit(error: BaseException) -> None:
    print(f"a fault: {error!r}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAULT)


if __name__ == "__main__":
    _Host(Connection(int(sys.argv[1])), int(sys.argv[2])).run()
    os._exit(0)
