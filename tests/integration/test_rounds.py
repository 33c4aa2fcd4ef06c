"""Rounds of samples on real ranks that share a sharded model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora.datasets.reader import Video
from opensora.storage import Storage

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("round_ranks.py")
REPOSITORY = Path(__file__).parents[2]


def play(run: Path, *, ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(run)], env={**shared, "RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


def clip(path: Path) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    with Video(Storage(str(path.parent)), path.name) as video:
        assert video.read(range(video.num_frames), lambda i, frame: found.update({i: np.array(frame)}))
    return np.stack([found[i] for i in sorted(found)]).astype(int)


def test_two_ranks_with_a_sharded_model_sample_what_one_samples(tmp_path: Path) -> None:
    """Three clips on two ranks; and ranks of which one is asked to stop all stop at the same model step."""
    for ranks in (1, 2):
        play(tmp_path / str(ranks), ranks=ranks)
    folders = [tmp_path / run / "samples/step-00000001" for run in ("1/zero2", "2/zero2", "2/zero3")]
    names = {"00.mp4", "01.mp4", "02.mp4", "sheet.png"}
    assert [{path.name for path in folder.iterdir()} for folder in folders] == [names] * 3
    for name in ("00.mp4", "01.mp4", "02.mp4"):
        alone, *shared = [clip(folder / name) for folder in folders]
        assert all(np.abs(frames - alone).max() <= 2 for frames in shared)
    assert not (tmp_path / "2/zero3/samples/step-00000002/sheet.png").exists()
