"""The number of parts that the bank kernels split their streams into: csrc/common/waves.h."""

import ctypes
from collections.abc import Callable
from math import ceil

import pytest

from tests.cuda_emulation import INCLUDE, load

MULTIPROCESSORS = [132, 114, 78, 108, 148]  # H100 SXM and PCIe, H20, A100, B200


@pytest.fixture(scope="module")
def whole_wave_parts() -> Callable[..., int]:
    function = load([INCLUDE.parent / "host_arithmetic.cu"])[0].whole_wave_parts
    function.argtypes, function.restype = [ctypes.c_int64] * 5, ctypes.c_int64
    return function


def steps_taken(blocks: int, steps: int, slots: int, fixed: int, parts: int) -> int:
    return ceil(blocks * parts / slots) * (ceil(steps / parts) + fixed)


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("queries", [1, 64, 256, 512, 1000, 1024, 2048, 4096, 17_920, 65_536])
def test_dense_grids(whole_wave_parts: Callable[..., int], queries: int, multiprocessors: int) -> None:
    blocks, tiles = ceil(queries / 128), 10_010  # 128 queries each, 1,281,167 rows in tiles of 128
    parts = whole_wave_parts(blocks, tiles, multiprocessors, 3, tiles // 4)
    taken = steps_taken(blocks, tiles, multiprocessors, 3, parts)
    assert taken <= 1.07 * blocks * tiles / multiprocessors
    best = min(steps_taken(blocks, tiles, multiprocessors, 3, p) for p in range(1, 9 * multiprocessors // blocks + 2))
    assert taken <= 1.03 * best
    waves = blocks * parts / multiprocessors
    assert ceil(waves) - waves < blocks / multiprocessors  # one more part for each stream would not fit


@pytest.mark.parametrize("slots", [1, 2, 7, 264])
def test_limits(whole_wave_parts: Callable[..., int], slots: int) -> None:
    for blocks in (1, 2, 3, 100, 1000):
        for steps in (1, 2, 63):
            for limit in (1, 2, steps):
                assert 1 <= whole_wave_parts(blocks, steps, slots, 1, limit) <= limit
