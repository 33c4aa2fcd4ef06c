"""What a run directory holds, by what people ask for: checkpoints, samples, config, logs, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Literal

from opensora import records
from opensora.checkpoint.manifest import MANIFEST_NAME, CheckpointInfo, find_checkpoint, find_checkpoints
from opensora.storage import ObjectInfo, Storage
from osctl.downloads import Item
from osctl.errors import ExitCode, OsctlError, UsageError

Step = int | Literal["latest"] | None
"""Of checkpoints and samples; None is the newest checkpoint and all samples."""


class What(StrEnum):
    """Parts of a run directory."""

    CONFIG = "config"
    SAMPLES = "samples"
    METRICS = "metrics"
    LOGS = "logs"
    CHECKPOINTS = "checkpoints"
    ALL = "all"


_PLACES: Mapping[What, tuple[str, ...]] = {
    What.CONFIG: (records.CONFIG_PATH, records.RUN_PATH, records.PROGRESS_PATH, records.BATCH_TABLE_PATH),
    What.SAMPLES: (f"{records.SAMPLES_PREFIX}/",),
    What.METRICS: ("metrics/", f"{records.TENSORBOARD_PREFIX}/"),
    What.LOGS: ("logs/", "dumps/", "skipped/", f"{records.ATTEMPTS_PREFIX}/"),
    What.CHECKPOINTS: (f"{records.CHECKPOINTS_PREFIX}/", f"{records.EXPORT_PREFIX}/"),
}
"""Objects, and folders with a slash at the end."""


def parse_step(text: str | None) -> Step:
    """What `--step` says. Raises UsageError."""
    if text is None or text == "latest":
        return "latest" if text else None
    if text.isascii() and text.isdigit():
        return int(text)
    raise UsageError(f"--step {text!r} is no step", hint="give a number, or latest")


def find_artifacts(run: Storage, what: Iterable[What], *, step: Step = None) -> list[Item]:
    """The objects to copy. Of checkpoints those that are complete, with their digests, and the manifest last.

    Raises:
        OsctlError: there is nothing of what was asked for by name.
    """
    asked = set(what)
    found: list[Item] = []
    for kind, places in _PLACES.items():
        if not asked & {kind, What.ALL}:
            continue
        items = list(_checkpoint(run, step) if kind is What.CHECKPOINTS else _objects(run, kind, places))
        if kind is What.SAMPLES and step is not None:
            items = _of_step(items, step)
        if not items and kind in asked:
            raise _missing(run, kind, step)
        found += items
    if not found:
        raise OsctlError(
            f"{run.uri} holds nothing of a run",
            hint="has the run started? check the address otherwise",
            exit_code=ExitCode.NOT_FOUND,
        )
    return found


def _objects(run: Storage, kind: What, places: Sequence[str]) -> Iterator[Item]:
    names = set(run.list_names())
    for place in places:
        if place.endswith("/"):
            infos: Iterable[ObjectInfo] = run.list(place)
        else:
            infos = [run.info(place)] if place in names else []
        yield from (Item(kind.value, info) for info in infos)


def _checkpoint(run: Storage, step: Step) -> Iterator[Item]:
    """One checkpoint, and with the newest the weights that a run exports at its end."""
    kind = What.CHECKPOINTS
    chosen = find_checkpoint(run, step if isinstance(step, int) else None)
    if chosen is not None:
        yield from _objects_of(run, chosen)
    if not isinstance(step, int):
        yield from _objects(run, kind, (f"{records.EXPORT_PREFIX}/",))


def _objects_of(run: Storage, chosen: CheckpointInfo) -> Iterator[Item]:
    kind = What.CHECKPOINTS.value
    infos = {info.path.removeprefix(f"{chosen.path}/"): info for info in run.list(chosen.path)}
    for entry in chosen.manifest.objects:
        if entry.path not in infos:
            raise OsctlError(
                f"the checkpoint of step {chosen.step} is being removed: the run keeps only its newest ones",
                hint="run the same command again; --step takes another one",
            )
        yield Item(kind, infos[entry.path], sha256=entry.sha256)
    if MANIFEST_NAME in infos:
        yield Item(kind, infos[MANIFEST_NAME], is_last=True)


def _of_step(items: Sequence[Item], step: int | Literal["latest"]) -> list[Item]:
    """The samples of one step."""
    pattern = re.compile(rf"{records.SAMPLES_PREFIX}/step-([0-9]+)/")
    steps = {item: int(match[1]) for item in items if (match := pattern.match(item.info.path)) is not None}
    wanted = max(steps.values(), default=0) if step == "latest" else step
    return [item for item in items if steps.get(item) == wanted]


def _missing(run: Storage, kind: What, step: Step) -> OsctlError:
    if kind is What.CHECKPOINTS:
        steps = [str(info.step) for info in find_checkpoints(run)]
        message = f"{run.uri} has no complete checkpoint" + (f" of step {step}" if isinstance(step, int) else "")
        hint = f"it has steps {', '.join(steps[-8:])}" if steps else "a run saves its first one after a while"
    else:
        message = f"{run.uri} has no {kind.value}" + (f" of step {step}" if isinstance(step, int) else "")
        hint = "leave out --step to take all" if step is not None else "`--what all` takes what there is"
    return OsctlError(message, hint=hint, exit_code=ExitCode.NOT_FOUND)
