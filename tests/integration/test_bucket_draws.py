"""A million draws of the vectorised bucket rule against the scalar one, which takes half a minute."""

from __future__ import annotations

import numpy as np
import pytest

from opensora.datasets.bucket import Bucket

pytestmark = pytest.mark.integration

TABLE = {
    "144p": {1: (0.7, 475), 51: ((0.9, 0.6), 51), 102: (0.8, 27)},
    "240p": {1: (0.4, 297), 51: (0.4, 20), 102: ((0.3, 0.33), 10)},
    "512": {1: (0.5, 141), 204: (0.0, None)},
}


def test_a_million_rows_are_assigned_as_one_by_one_bit_for_bit() -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    bucket = Bucket(TABLE)
    frames = rng.choice([1, 40, 51, 52, 60, 103, 300], n).astype(np.int32)
    height, width = rng.integers(100, 1300, (2, n), dtype=np.int32)
    # Ids up to 10^10: the draws' seeds have one word for some rows and two for others.
    ids = (10 ** rng.uniform(0, 10, n)).astype(np.int64)
    seed, epoch = 2**31, 7
    assigned = bucket.assign(frames, height, width, ids, seed=seed, epoch=epoch)
    names = [(shape.resolution, shape.num_frames, shape.ratio) for shape in bucket.entries]
    seeds = (seed + epoch + ids * len(bucket)).tolist()
    assert (max(seeds) > 2**32) & (min(seeds) < 2**32)
    rows = zip(frames.tolist(), height.tolist(), width.tolist(), seeds, assigned.tolist(), strict=True)
    wrong = [
        row for row in rows if bucket.get_bucket_id(*row[:3], seed=row[3]) != (names[row[4]] if row[4] >= 0 else None)
    ]
    assert wrong == []
    assert 0.2 < (assigned >= 0).mean() < 0.8
