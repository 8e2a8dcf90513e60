"""A contestant is an engine that takes part in a measurement; most run in their own process.

A contestant's program reads one workload per line, and answers with tokens and seconds
(`programs/line_protocol.py`). Between its turns its process group is stopped, so that no thread of
a waiting contestant uses the processor while another is measured. The group stays in our session:
if our process dies, the kernel resumes the stopped processes and sends them SIGHUP.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from milliways.benchmarks.speed.workload import Workload

READY_TIMEOUT_S = 900
MEASURE_TIMEOUT_S = 900
_CLOSE_TIMEOUT_S = 10
_NUM_LOG_LINES = 3


class ContestantError(Exception):
    """A contestant cannot take part, or has failed; the message is for the report."""


class Contestant(Protocol):
    """Something whose speed can be measured."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str:
        """Version, precision and settings, for the report."""
        ...

    def measure(self, workload: Workload) -> float:
        """Runs a workload once; returns tokens per second.

        Raises:
            ContestantError: it failed. It cannot be measured again.
        """
        ...

    def close(self) -> None:
        """Ends its processes."""
        ...


class ProgramContestant:
    """A contestant whose model stays loaded in a process of its own.

    Invariant: outside `measure`, the process group is stopped or has ended.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> None:
        """Starts the program and waits until its model is loaded.

        Raises:
            ContestantError: the program cannot be started, or cannot load its model.
        """
        self.name = name
        self._log_path = log_path
        try:
            with log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    process_group=0,
                )
        except OSError as error:
            raise ContestantError(f"{command[0]}: {error.strerror}") from error
        self._replies = _Lines(_pipe(self._process.stdout))
        try:
            self.about = str(self._receive(READY_TIMEOUT_S)["about"])
        except BaseException:
            # Ctrl-C during the wait must not leave the process behind either.
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def measure(self, workload: Workload) -> float:
        self._signal(signal.SIGCONT)
        try:
            self._send(workload.to_request())
            reply = self._receive(MEASURE_TIMEOUT_S)
        finally:
            self._signal(signal.SIGSTOP)
        return reply["tokens"] / reply["seconds"]

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait(_CLOSE_TIMEOUT_S)
        _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _send(self, request: Mapping[str, int | str]) -> None:
        stdin = _pipe(self._process.stdin)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._failed("its process ended") from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._replies.next_line(timeout_s)
        except TimeoutError as error:
            raise self._failed(f"no answer in {timeout_s:.0f} s") from error
        if not line:
            raise self._failed("its process ended")
        return json.loads(line)

    def _failed(self, what: str) -> ContestantError:
        lines = self._log_path.read_text("utf-8", errors="replace").strip().splitlines()
        return ContestantError(" / ".join([what, *lines[-_NUM_LOG_LINES:]]))


class _Lines:
    """Reads lines from a pipe, with a timeout.

    Invariant: `_buffer` holds the bytes that were read after the last returned line.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._fd = pipe.fileno()
        self._buffer = b""

    def next_line(self, timeout_s: float) -> bytes:
        """The next complete line; empty at the end of the pipe.

        Raises:
            TimeoutError: no complete line arrived within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            remaining_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([self._fd], [], [], remaining_s)[0]:
                raise TimeoutError
            data = os.read(self._fd, 1 << 16)
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the process was started with pipes"
    return pipe
