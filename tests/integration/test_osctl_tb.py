"""`osctl tb` with the real TensorBoard, on a run in a bucket that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from opensora.storage import Storage

pytestmark = pytest.mark.integration


def _upload(folder: Path, run: Storage) -> None:
    for path in folder.rglob("events*"):
        run.upload(path, f"tensorboard/{path.name}")


def _steps(url: str) -> list[int]:
    with urllib.request.urlopen(f"{url}data/plugin/scalars/tags", timeout=10) as answer:
        runs = json.load(answer)
    if "loss" not in runs.get(".", {}):
        return []
    with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?run=.&tag=loss", timeout=10) as answer:
        return [int(step) for _, step, _ in json.load(answer)]


def _until_steps(url: str, wanted: list[int]) -> None:
    deadline = time.monotonic() + 90
    while (found := _steps(url)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_the_page_shows_steps_that_come_later(bucket: str, tmp_path: Path) -> None:
    run = Storage(f"s3://{bucket}/runs/first")
    writer = SummaryWriter(str(tmp_path / "events"))
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    _upload(tmp_path / "events", run)
    process = subprocess.Popen(
        [sys.executable, "-m", "osctl", "tb", run.uri, "--every", "1"],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONUNBUFFERED": ""},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate()
        _until_steps(url, [1])
        writer.add_scalar("loss", 0.5, 2)
        writer.flush()
        _upload(tmp_path / "events", run)
        _until_steps(url, [1, 2])
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        writer.close()
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (0, "TensorBoard ends")
