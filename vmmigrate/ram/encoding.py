"""How pages become records: zero pages by name only, everything else as it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Words that are looked at first, one in each KiB: most pages show by them that they are not zero.
_SAMPLE = slice(None, None, 128)


def nonzero(pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of *pages*, shape (n, 512), hold anything but zeros. Runs at memory speed, or above it if none seems zero.

    A page that is written meanwhile may be judged either way.
    """
    flags: npt.NDArray[np.bool_] = (pages[:, _SAMPLE] != 0).any(axis=1)
    if not flags.all():
        flags = pages.max(axis=1) != 0
    return flags
