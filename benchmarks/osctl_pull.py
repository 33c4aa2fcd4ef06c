"""Measures `osctl pull` of a checkpoint against a plain copy of the same objects, from an object store (SeaweedFS).

python benchmarks/osctl_pull.py                  1000 MB in 60 objects, 5 rounds
python benchmarks/osctl_pull.py --megabytes 4000 --jobs 8

Both are processes of their own, started alternately because times drift, each into a new folder. The plain copy is
s3fs's own `get` of the whole folder: no retries, no digests, nothing on the disk for certain. The goal is 0.8 of its
throughput. The third line is for comparison: that copy, then a digest of every file and a sync, which is what `osctl
pull` promises. On a machine where store and client share all processors, digests and the start of osctl show in full.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from opensora.checkpoint.manifest import MANIFEST_NAME, DataObject, Manifest, checkpoint_folder
from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

GOAL = 0.8
OBJECT_BYTES = 16 * 2**20
PLAIN = "import s3fs, sys; s3fs.S3FileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"
CHECKED = f"""{PLAIN}
import hashlib, os, pathlib
for path in pathlib.Path(sys.argv[2]).rglob("*"):
    if path.is_file():
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
"""


def write_checkpoint(run: Storage, megabytes: int) -> int:
    """A complete checkpoint of random bytes; returns its size."""
    folder = run.child(checkpoint_folder(1000, attempt=1))
    objects = []
    for number in range(max(1, round(megabytes * 1e6 / OBJECT_BYTES))):
        content = os.urandom(OBJECT_BYTES)
        name = f"rank-00000-{number:05d}.bin"
        folder.write(name, content)
        objects.append(DataObject(name, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        step=1000, attempt=1, saved_at="2026-01-01T00:00:00+00:00", num_ranks=1, metadata={}, objects=tuple(objects)
    )
    folder.write(MANIFEST_NAME, manifest.to_json())
    return manifest.num_bytes


def seconds_of(command: list[str], target: Path) -> float:
    """How long a copy into an empty folder takes."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    subprocess.run([*command, str(target)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="objects that osctl copies at a time; its own number unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ObjectStore(Path(name) / "store") as store:
        os.environ.update(store.environment())
        store.create_bucket("benchmark")
        run = Storage("s3://benchmark/run")
        size = write_checkpoint(run, options.megabytes)
        jobs = [] if options.jobs is None else ["--jobs", str(options.jobs)]
        commands = {
            "s3fs get": [sys.executable, "-c", PLAIN, run.uri],
            "s3fs, checked": [sys.executable, "-c", CHECKED, run.uri],
            "osctl pull": [sys.executable, "-m", "osctl", "pull", run.uri, "--what", "checkpoints", *jobs, "--to"],
        }
        times: dict[str, list[float]] = {what: [] for what in commands}
        for _ in range(options.rounds):
            for what, command in commands.items():
                times[what].append(seconds_of(command, Path(name) / "target"))
    print(f"{size / 1e6:.0f} MB, {os.cpu_count()} CPUs, {platform.machine()}, {options.rounds} rounds")
    for what, found in times.items():
        median = statistics.median(found)
        print(f"{what:<15}{median:6.2f} s   {size / 1e6 / median:6.0f} MB/s   ({', '.join(f'{t:.2f}' for t in found)})")
    ratio = statistics.median(times["s3fs get"]) / statistics.median(times["osctl pull"])
    print(f"{ratio:.2f} of the throughput of a plain copy; the goal is {GOAL}")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
