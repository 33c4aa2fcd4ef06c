from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.datasets.pcg64 import default_rng_uniforms


def numpys(seeds: list[int], count: int) -> np.ndarray:
    return np.array([np.random.default_rng(seed).random(count) for seed in seeds]).reshape(-1, count).T


@pytest.mark.parametrize("bits", [1, 8, 31, 32, 33, 48, 63, 64])
def test_draws_are_numpys_for_seeds_of_every_size(bits: int) -> None:
    seeds = np.random.default_rng(bits).integers(0, 2**bits, 2000, dtype=np.uint64, endpoint=False)
    assert (default_rng_uniforms(seeds, 2) == numpys(seeds.tolist(), 2)).all()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.integers(1, 5))
def test_draws_are_numpys(seeds: list[int], count: int) -> None:
    assert (default_rng_uniforms(np.array(seeds, np.uint64), count) == numpys(seeds, count)).all()


def test_draws_at_the_borders_of_words() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert (default_rng_uniforms(np.array(seeds, np.uint64), 3) == numpys(seeds, 3)).all()
