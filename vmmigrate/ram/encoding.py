"""How pages become records: zero pages by name only, everything else as it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def nonzero(pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of *pages*, shape (n, 512), hold anything but zeros. Runs at memory speed."""
    flags: npt.NDArray[np.bool_] = pages.max(axis=1) != 0
    return flags
