"""Regions of shared memory: none overlaps another, and all of it comes back."""

import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milliways.wire.shm import (
    RegionAllocator,
    SharedMemory,
    attach_segment,
    local_host_id,
    make_segment,
)
from milliways.wire.tensors import ALIGNMENT, MalformedMessageError, Payload, aligned

SEGMENT_BYTES = 1 << 16


@given(st.lists(st.one_of(st.integers(0, 9000), st.integers(-20, -1)), max_size=60))
@settings(deadline=None)
def test_regions_never_overlap_and_gaps_grow_together(steps: list[int]) -> None:
    """A step is a size to allocate, or which of the regions to free."""
    allocator = RegionAllocator(SEGMENT_BYTES)
    taken: dict[int, int] = {}
    for step in steps:
        if step < 0:
            if taken:
                offset = sorted(taken)[step % len(taken)]
                allocator.free(offset)
                del taken[offset]
        else:
            offset = allocator.try_allocate(step)
            if offset is None:
                assert largest_gap(taken) < aligned(max(step, 1))
            else:
                assert offset % ALIGNMENT == 0
                taken[offset] = aligned(max(step, 1))
        assert allocator.num_taken_bytes == sum(taken.values())
        ends = [offset + size for offset, size in sorted(taken.items())]
        assert all(end <= offset for end, offset in zip(ends, sorted(taken)[1:], strict=False))
    for offset in taken:
        allocator.free(offset)
    assert allocator.try_allocate(SEGMENT_BYTES) == 0


def largest_gap(taken: dict[int, int]) -> int:
    starts = [*sorted(taken), SEGMENT_BYTES]
    ends = [0, *(offset + taken[offset] for offset in sorted(taken))]
    return max(start - end for start, end in zip(starts, ends, strict=True))


def make_memory(num_bytes: int = 4096, max_bytes: int = 1 << 20) -> SharedMemory:
    memory = SharedMemory(num_bytes, max_bytes)
    grow(memory, num_bytes)
    return memory


def grow(memory: SharedMemory, num_bytes: int) -> bool:
    grown = memory.try_grow(num_bytes)
    if grown is not None:
        os.close(grown[2])
    return grown is not None


def test_region_is_free_when_no_view_of_its_response_is_left() -> None:
    memory = make_memory()
    region = memory.try_allocate(100, 200)
    assert region is not None and region.response_offset == 128
    payload = memory.response(region, 200)
    view = payload[64:128].view(np.float32).reshape(4, 4)
    del payload
    gc.collect()
    assert memory.num_taken_bytes == aligned(328)
    del view
    assert memory.num_taken_bytes == 0


def test_spare_regions_make_room_for_other_sizes() -> None:
    memory = make_memory()
    regions = [memory.try_allocate(100, 900) for _ in range(3)]
    for region in regions:
        assert region is not None
        memory.free(region)
    assert memory.try_allocate(100, 900) in regions
    assert memory.try_allocate(100, 1900) is not None


def test_memory_grows_up_to_its_bound() -> None:
    memory = make_memory(4096, max_bytes=4096 + 8192)
    assert memory.try_allocate(4097, 0) is None
    assert grow(memory, 4097)
    region = memory.try_allocate(4097, 0)
    assert region is not None and region.segment_id == 1
    assert memory.num_bytes == 4096 + 8192
    assert not grow(memory, 1)


def test_both_sides_see_what_is_written() -> None:
    memory = SharedMemory(4096, 4096)
    grown = memory.try_grow(1)
    assert grown is not None
    _, num_bytes, file = grown
    segment = attach_segment(file, num_bytes)
    os.close(file)
    region = memory.try_allocate(16, 0)
    assert region is not None
    memory.write_request(region, Payload((np.arange(4, dtype=np.int32),), (0,), 16))
    np.testing.assert_array_equal(
        np.frombuffer(segment.buffer, np.int32, 4, region.offset), [0, 1, 2, 3]
    )


def test_segment_that_could_shrink_is_refused() -> None:
    file = os.memfd_create("unsealed")
    os.ftruncate(file, 4096)
    with pytest.raises(MalformedMessageError, match="not a sealed 4096"):
        attach_segment(file, 4096)
    os.close(file)
    _, file = make_segment(4096)
    with pytest.raises(MalformedMessageError, match="4096 bytes, not a sealed 8192"):
        attach_segment(file, 8192)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    os.close(file)
    reading, writing = os.pipe()
    with pytest.raises(MalformedMessageError):
        attach_segment(reading, 4096)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(("offset", "num_bytes"), [(4, 8), (4096, 1), (0, 4097), (2**63, 64)])
def test_region_outside_a_segment_is_refused(offset: int, num_bytes: int) -> None:
    segment, file = make_segment(4096)
    os.close(file)
    segment.check(0, 4096)
    with pytest.raises(MalformedMessageError):
        segment.check(offset, num_bytes)


def test_host_id_is_that_of_the_whole_host() -> None:
    assert local_host_id() == local_host_id() != ""
