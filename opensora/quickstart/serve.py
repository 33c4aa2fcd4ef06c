"""An object store with the quickstart's clips, for a cluster to try things out: `python -m opensora.quickstart.serve`.

It makes a bucket, puts clips and their catalogue below `clips/`, writes a file `ready` into its folder, and serves
until SIGTERM. Who may use it is in `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`. Everything is lost with the folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from opensora.errors import ExitCode, OpenSoraError, StorageError, UsageError
from opensora.quickstart.clips import CATALOGUE, prepare_clips
from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

logger = logging.getLogger(__name__)

READY = "ready"
"""Name of the file that is there as long as clips can be read."""
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_LOOK_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m opensora.quickstart.serve", description="An S3 server with clips.")
    parser.add_argument("--folder", type=Path, required=True, help="where it keeps everything")
    parser.add_argument("--address", default="127.0.0.1", help="where it listens; 0.0.0.0 for others' use")
    parser.add_argument("--port", type=int, default=8333, help="its port")
    parser.add_argument("--bucket", default="opensora", help="name of the bucket")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _serve(options)
    except OpenSoraError as error:
        logger.error("error: %s", error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return ExitCode.DONE
    return ExitCode.DONE


def _serve(options: argparse.Namespace) -> None:
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} is not set", hint="clients have to give the same keys")
    access_key, secret_key = (os.environ[name] for name in _KEYS)
    ready = options.folder / READY
    ready.unlink(missing_ok=True)
    store = ObjectStore(
        options.folder / "store",
        address=options.address,
        port=options.port,
        access_key=access_key,
        secret_key=secret_key,
    )
    with store:
        _fill(store, options.bucket, options.folder / "clips")
        ready.touch()
        logger.info("serving s3://%s at %s", options.bucket, store.endpoint_url)
        try:
            while store.is_running:
                time.sleep(_LOOK_SECONDS)
        finally:
            ready.unlink(missing_ok=True)
        raise StorageError(f"the server has ended:\n{store.log_tail()}")


def _fill(store: ObjectStore, bucket: str, folder: Path) -> None:
    """Clips first, the catalogue that names them last."""
    os.environ.update(store.environment())
    store.create_bucket(bucket)
    clips = prepare_clips(folder)
    target = Storage(f"s3://{bucket}/clips")
    for name in [*(clip.path.name for clip in clips), CATALOGUE]:
        target.write(name, (folder / name).read_bytes())
    logger.info("%d clips and their catalogue are in %s", len(clips), target.uri)


if __name__ == "__main__":
    sys.exit(main())
