"""Counter-based randomness: every draw is a pure function of (seed, epoch, row, purpose).

No generator is carried from one draw to the next, so results depend neither on the number of ranks and workers
nor on where a run was interrupted. numpy's Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) is keyed by a hash of the four parts. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

Purpose = Literal[
    "frames", "noise", "timestep", "mask", "drop_text", "order", "posterior", "validation", "sample", "drop_path"
]


def rng(seed: int, *, epoch: int, row: int, purpose: Purpose) -> np.random.Generator:
    """A generator that is the same wherever and whenever these four values are used."""
    text = f"{seed}/{epoch}/{row}/{purpose}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
