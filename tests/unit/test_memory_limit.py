"""Memory limits of containers, for both versions of cgroups."""

import os
from pathlib import Path

import pytest

from milliways.cluster.host.memory_limit import limits, usable_memory_bytes

GB = 10**9


def tree(root: Path, own: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"
CASES = {
    "version 2, in a namespace of its own": ("0::/", {f"{V2}/memory.max": str(2 * GB)}, [2 * GB]),
    "version 2, a limit further up": (
        "0::/kube/pod/it",
        {f"{V2}/kube/memory.max": str(3 * GB), f"{V2}/kube/pod/it/memory.max": "max"},
        [3 * GB],
    ),
    "version 1, the host's path does not exist here": (
        "11:cpu,cpuacct:/docker/1\n7:memory:/docker/1",
        {f"{V1}/memory.limit_in_bytes": str(GB)},
        [GB],
    ),
    "version 1, no limit": (
        "7:memory:/a",
        {f"{V1}/a/memory.limit_in_bytes": "9223372036854771712"},
        [9223372036854771712],
    ),
    "no cgroups": ("", {}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_limits(tmp_path: Path, case: str) -> None:
    own, files, expected = CASES[case]
    root = tree(tmp_path, own, files)
    assert list(limits(root)) == expected
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_memory_bytes(root) == min([machine_bytes, *expected])


def test_machine_without_cgroups_has_its_own_memory(tmp_path: Path) -> None:
    assert usable_memory_bytes(tmp_path) == usable_memory_bytes(tmp_path / "nothing")
