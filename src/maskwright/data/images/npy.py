"""NPY files of numpy, read without unpickling anything."""

from __future__ import annotations

import io

import numpy as np

from maskwright.errors import MaskwrightError, one_line

SIGNATURE = b"\x93NUMPY"


def read_npy(data: bytes, max_values: int, name: str, error_type: type[MaskwrightError]) -> np.ndarray:
    """Return the array in an NPY file with at most `max_values` values.

    Raises:
        MaskwrightError: of `error_type`; the file is damaged, truncated, too large, or contains Python objects.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.kind not in "biufc" or np.prod(shape, dtype=float) > max_values:
            raise ValueError(f"it is an array of {dtype} and shape {shape}")
        stream.seek(0)
        return np.load(stream, allow_pickle=False)
    except Exception as error:  # numpy evaluates the header as Python, which raises almost any type for a damaged one
        raise error_type(
            f"an NPY file that cannot be read ({one_line(error)})", where=name, remedy="save the array again"
        ) from None
