"""Counts and look-ups per run of equal pixels equal those per pixel, on maps, on noise, and on tiny images."""

import numpy as np
import pytest

from maskwright.structures.id_maps import count_values, look_up, present_values


def maps(kind):
    """Maps with blocks, with noise, with one value, and with few pixels."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 40, (9, 7)), np.ones((8, 31), dtype=int))
    yield from (blocks, rng.integers(0, 200, (64, 65)), np.full((33, 5), 7), np.zeros((1, 1), int), blocks[:1, :8])
    for width in range(1, 20):
        yield (np.arange(9 * width).reshape(1, -1) // (width + 9)).astype(kind)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
def test_values_of_a_map_are_found_counted_and_looked_up(kind):
    tables = [np.random.default_rng(1).integers(0, 250, 256).astype(dtype) for dtype in (np.uint8, bool, np.int32)]
    for values in maps(kind):
        values = values.astype(kind)
        np.testing.assert_array_equal(present_values(values), np.unique(values))
        counted = count_values(values, 256)
        np.testing.assert_array_equal(counted, np.bincount(values.ravel(), minlength=256))
        assert counted.dtype == np.int64
        for table in tables:
            found = look_up(table, values)
            np.testing.assert_array_equal(found, table[values])
            assert found.dtype == table.dtype


def test_map_without_pixels_has_no_values():
    empty = np.zeros((0, 4), dtype=np.uint8)
    assert present_values(empty).tolist() == []
    assert count_values(empty, 3).tolist() == [0, 0, 0]
    assert look_up(np.arange(3), empty).shape == (0, 4)
