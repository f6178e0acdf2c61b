"""NPY files, as numpy writes arrays; never anything that would run code."""

from __future__ import annotations

import io

import numpy as np

from maskwright.errors import MaskwrightError

SIGNATURE = b"\x93NUMPY"


def read_npy(data: bytes, max_values: int, name: str, error_type: type[MaskwrightError]) -> np.ndarray:
    """The array in a file of at most `max_values` values.

    Raises:
        MaskwrightError: it is damaged, cut off, too large, or holds Python objects; the message begins with `name`.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject or np.prod(shape, dtype=float) > max_values:
            raise ValueError(f"it is an array of {dtype} and shape {shape}")
        stream.seek(0)
        return np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise error_type(f"{name}: an NPY file that cannot be read ({reason}); save the array again") from None
