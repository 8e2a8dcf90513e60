"""The network between two nodes breaks: one side continues, without a lost token."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.conftest import REPOSITORY
from tests.faults.partition import FIRST_HOST, SECOND_HOST
from tests.served_cluster import child_environment, short_folder

FIRST, SECOND = f"mwa{os.getpid()}", f"mwb{os.getpid()}"
FIRST_LINK, SECOND_LINK = f"va{os.getpid()}", f"vb{os.getpid()}"
TIMEOUT_S = 540.0


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"mwp{os.getpid()}"
    try:
        ip("netns", "add", probe)
    except subprocess.CalledProcessError:
        return False
    try:
        ip("-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "other")
        ip("netns", "exec", probe, "true")
    except subprocess.CalledProcessError:
        return False
    finally:
        ip("netns", "del", probe)
    return True


@contextmanager
def two_namespaces() -> Iterator[None]:
    """Two network namespaces with a link between them. Their processes end with this."""
    names = (FIRST, SECOND)
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", FIRST_LINK, "type", "veth", "peer", "name", SECOND_LINK)
        ends = ((FIRST, FIRST_LINK, FIRST_HOST), (SECOND, SECOND_LINK, SECOND_HOST))
        for name, link, host in ends:
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{host}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                for pid in ip("netns", "pids", name).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "del", name)


def test_partition_costs_no_token() -> None:
    # Checked here and not at collection, because the check creates a namespace.
    if not can_make_namespaces():
        pytest.skip("network namespaces need root")
    with short_folder() as folder, two_namespaces():
        command = ["ip", "netns", "exec", FIRST, sys.executable, "-m", "tests.faults.partition"]
        done = subprocess.run(
            [*command, SECOND, str(folder)],
            cwd=REPOSITORY,
            env=child_environment(folder, SECOND_LINK=SECOND_LINK),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        # pytest -s shows these figures.
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
