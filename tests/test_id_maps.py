"""Counts and look-ups per run of equal pixels equal those per pixel, on maps, on noise, and on tiny images."""

import numpy as np
import pytest

from maskwright.structures.id_maps import count_values, id_dtype, look_up, present_values


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


@pytest.mark.parametrize("size", [1, 3, 255, 256])
def test_every_byte_is_looked_up_in_a_table_of_bytes(size):
    table = np.random.default_rng(size).integers(1, 256, size, np.uint8)
    np.testing.assert_array_equal(look_up(table, np.arange(size, dtype=np.uint8)[None]), table[None])


def test_bytes_hold_the_ids_of_at_most_255_objects():
    assert id_dtype(255) is np.uint8  # and 0 for no object
    assert id_dtype(256) is np.int32


def test_map_without_pixels_has_no_values():
    empty = np.zeros((0, 4), dtype=np.uint8)
    assert present_values(empty).tolist() == []
    assert count_values(empty, 3).tolist() == [0, 0, 0]
    assert look_up(np.arange(3), empty).shape == (0, 4)
