"""Run directories as runs leave them, of a few bytes."""

from __future__ import annotations

import hashlib
import json
import os

from opensora.checkpoint.manifest import INDEX_NAME, MANIFEST_NAME, DataObject, Manifest, checkpoint_folder
from opensora.storage import Storage


def add_checkpoint(run: Storage, step: int, *, attempt: int = 1, num_objects: int = 2, size: int = 3000) -> str:
    """A complete checkpoint of random bytes; returns its folder."""
    path = checkpoint_folder(step, attempt=attempt)
    contents = {f"rank-00000-{number:05d}.bin": os.urandom(size) for number in range(num_objects)}
    contents[INDEX_NAME] = b"{}"
    objects = []
    for name, content in contents.items():
        run.write(f"{path}/{name}", content)
        objects.append(DataObject(name, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        step=step,
        attempt=attempt,
        saved_at="2026-01-01T00:00:00+00:00",
        num_ranks=1,
        metadata={},
        objects=tuple(objects),
    )
    run.write(f"{path}/{MANIFEST_NAME}", manifest.to_json())
    return path


def make_run(uri: str) -> Storage:
    """Two checkpoints, two rounds of samples, and some of everything else."""
    run = Storage(uri)
    add_checkpoint(run, 100)
    add_checkpoint(run, 200, attempt=2)
    run.write("config.yaml", b"train: {steps: 300}\n")
    run.write("progress.json", json.dumps({"step": 210}).encode())
    for step in (100, 200):
        for name in ("00.mp4", "01.mp4", "sheet.png"):
            run.write(f"samples/step-{step:08d}/{name}", f"{name} of step {step}".encode())
    run.write("metrics/attempt-1/part-00000.jsonl", b"{}\n")
    run.write("logs/attempt-1/rank-0/part-00000.log", b"hello\n")
    run.write("attempts/1/started.json", b"{}")
    run.write("tensorboard/events.1", b"events")
    return run


def content_of(run: Storage) -> dict[str, bytes]:
    """Path → content of everything in a storage."""
    return {info.path: run.read(info.path) for info in run.list()}
