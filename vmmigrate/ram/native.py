"""Page digests by machine code, where a C compiler was at hand when the package was installed.

`native.c` computes what `digest` says, several times faster than NumPy, in one pass that also finds pages of zeros. It
is optional: without it everything works, slower. It is loaded by ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_WORDS: Final = 512
_HALF: Final = np.uint64(32)
_LOW: Final = np.uint64((1 << 32) - 1)

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def _load() -> Any:
    for path in Path(__file__).parent.glob("_native.*.so"):
        try:
            function = ctypes.CDLL(str(path)).vmmigrate_digest_pages
        except (OSError, AttributeError):
            continue  # built for another machine: NumPy will do
        address, size = ctypes.c_void_p, ctypes.c_size_t
        function.argtypes = (address, address, size, address, address, address)
        function.restype = None
        return function
    return None


_DIGEST_PAGES: Final = _load()
IS_THERE: Final = _DIGEST_PAGES is not None


class NativeHash:
    """The digest function with the weights *low* and *high*, 512 words each. Only where `IS_THERE`."""

    def __init__(self, low: Words, high: Words) -> None:
        upper = np.stack([low >> _HALF, (low & _LOW) + (high >> _HALF) & _LOW], axis=1)
        self._weights = b"".join([(low & _LOW).tobytes(), (high & _LOW).tobytes(), upper.astype(np.uint32).tobytes()])

    def look(self, ram: Words, numbers: Numbers | None) -> tuple[Words, Flags]:
        """As `digest.PageHash.look`; *numbers* lie within *ram*, whose pages lie in one piece."""
        count = len(ram) if numbers is None else len(numbers)
        digests, nonzero = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.bool_)
        first = None if numbers is None else numbers.ctypes.data
        _DIGEST_PAGES(ram.ctypes.data, first, count, self._weights, digests.ctypes.data, nonzero.ctypes.data)
        return digests, nonzero
