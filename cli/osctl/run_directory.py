"""The run directory that a command reads: that of a run of the cluster, or one by its address."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osctl.client import Object
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.session import Session
from osctl.targets import fetch, parse_run

if TYPE_CHECKING:  # imported late: it takes a while, and a mistyped name is told before
    from opensora.storage import Storage

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files."""

    name: str
    """Of the run, or of the folder."""
    storage: Storage
    body: Object | None = None
    """The TrainingRun, where it was asked for by its name."""


def is_address(word: str) -> bool:
    """Whether a word is a URI or a path, and not a name."""
    return "://" in word or "\\" in word or word.startswith(("/", ".", "~"))


def open_run_directory(session: Session, word: str) -> RunDirectory:
    """The directory of a run of the cluster (`NAME`), or at an address (`s3://…`, `./…`, `/…`).

    Raises:
        OsctlError: there is no such run, or its directory is a folder that this machine does not have.
        StorageError: it is no address of a store.
    """
    if is_address(word):
        storage = open_storage(word)
        _refuse_missing(storage, hint="check the path for a typing error")
        return RunDirectory(storage.uri.rpartition("/")[2] or "run", storage)
    target = parse_run(word)
    body = fetch(session, target)
    spec = body.get("spec") or {}
    if not isinstance(spec.get("runUri"), str):
        raise UsageError(f"{target.name} has no spec.runUri", hint="give the address of its run directory instead")
    storage = open_storage(spec["runUri"], spec)
    hint = "it is a folder of its pods or nodes: mount the volume here, and give that path instead of the name"
    _refuse_missing(storage, hint=hint)
    session.output.detail(f"the run directory of {target.name} is {storage.uri}")
    return RunDirectory(target.name, storage, body)


def open_storage(uri: str, spec: Any = None, *, patience_seconds: float = 300.0) -> Storage:
    """The store behind a URI. The endpoint of this machine's environment wins over that of an object's spec, which is
    often an address inside of the cluster."""
    from opensora.config.train import StorageConfig
    from opensora.storage import Storage

    endpoint = ((spec or {}).get("storage") or {}).get("endpoint")
    if any(os.environ.get(name) for name in _ENDPOINTS):
        endpoint = None
    return Storage(uri, config=StorageConfig(endpoint_url=endpoint, retry_deadline_seconds=patience_seconds))


def _refuse_missing(storage: Storage, *, hint: str) -> None:
    if storage.is_local and not Path(storage.uri).is_dir():
        raise OsctlError(f"there is no folder {storage.uri} on this machine", hint=hint, exit_code=ExitCode.NOT_FOUND)
