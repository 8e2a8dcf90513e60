"""The allocator's settings are taken where there is such an allocator."""

import platform

from milliways.runtime.malloc import keep_freed_blocks


def test_glibc_takes_the_settings() -> None:
    assert keep_freed_blocks() == (platform.libc_ver()[0] == "glibc")
