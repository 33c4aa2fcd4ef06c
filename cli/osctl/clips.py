"""The clips that a run or a SampleJob made: which there are, and from what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from opensora.errors import ObjectNotFoundError
from opensora.records import CONFIG_PATH, SAMPLES_PREFIX
from opensora.storage import ObjectInfo, Storage
from osctl.artifacts import Step
from osctl.errors import ExitCode, OsctlError

VIDEO, PICTURE = ".mp4", ".png"
_SHEET = "sheet.png"
_READ_THREADS = 16


@dataclass(frozen=True)
class Clip:
    """A result of sampling."""

    info: ObjectInfo
    uri: str
    prompt: str | None = None
    """None where nothing says it."""
    seed: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def as_data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "uri": self.uri, "bytes": self.info.size, "prompt": self.prompt, "seed": self.seed,
            "numFrames": self.num_frames, "height": self.height, "width": self.width, "fps": self.fps,
        }  # fmt: skip


@dataclass(frozen=True)
class Round:
    """Clips that were made together."""

    folder: Storage
    step: int | None
    """Of the training; None for those of a SampleJob."""
    clips: tuple[Clip, ...]
    sheet: ObjectInfo | None


def find_round(run: Storage, *, step: Step = None) -> Round:
    """A round of samples of a run directory: of a step, or the newest that has its contact sheet.

    Raises:
        OsctlError: there is none.
    """
    names = run.list_names(SAMPLES_PREFIX)
    steps = {int(match[1]): name for name in names if (match := re.fullmatch(r"step-([0-9]+)", name)) is not None}
    wanted = [step] if isinstance(step, int) else sorted(steps, reverse=True)
    settings = _settings(run)
    unfinished: Round | None = None
    for number in wanted:
        if number not in steps:
            continue
        folder = run.child(f"{SAMPLES_PREFIX}/{steps[number]}")
        found = _round(folder, step=number, settings=settings)
        if found.sheet is not None or isinstance(step, int):
            return found
        unfinished = unfinished or (found if found.clips else None)
    if unfinished is not None:
        return unfinished
    what = f" of step {step}" if isinstance(step, int) else ""
    newest = ", ".join(str(number) for number in sorted(steps)[-8:])
    hint = f"there are samples of steps {newest}" if steps else "a run makes them every samples.every_steps steps"
    raise OsctlError(f"{run.uri} has no samples{what}", hint=hint, exit_code=ExitCode.NOT_FOUND)


def read_folder(folder: Storage) -> Round:
    """The clips of a folder that a sampling job wrote. Raises OsctlError where there are none."""
    found = _round(folder, step=None, settings={})
    if not found.clips:
        raise OsctlError(
            f"{folder.uri} has no clips", hint="has the job made any? `osctl get sj`", exit_code=ExitCode.NOT_FOUND
        )
    return found


def _round(folder: Storage, *, step: int | None, settings: Mapping[str, Any]) -> Round:
    infos = {info.path: info for info in folder.list()}
    sheets = [info for path, info in infos.items() if path == _SHEET or path.endswith(f"_{_SHEET}")]
    media = [
        info
        for path, info in infos.items()
        if path.endswith((VIDEO, PICTURE)) and info not in sheets and "/" not in path
    ]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        records = list(pool.map(lambda info: _record(folder, info, infos), media))
    pairs = sorted(zip(media, records, strict=True), key=_order)
    clips = tuple(_clip(folder, info, record, settings) for info, record in pairs)
    return Round(folder, step, clips, sheets[0] if sheets else None)


def _order(pair: tuple[ObjectInfo, Mapping[str, Any]]) -> tuple[int, int, str]:
    """As they were made, which is the order of the contact sheet."""
    info, record = pair
    return _number(record.get("index")) or 0, _number(record.get("draw")) or 0, info.path


def _record(folder: Storage, info: ObjectInfo, infos: Mapping[str, ObjectInfo]) -> Mapping[str, Any]:
    """What a sampling job says of a clip; empty where it says nothing."""
    path = f"{info.path.rpartition('.')[0]}.json"
    if path not in infos:
        return {}
    try:
        record = json.loads(folder.read(path))
    except (ObjectNotFoundError, ValueError):  # it is being made anew
        return {}
    return record if isinstance(record, dict) else {}


def _clip(folder: Storage, info: ObjectInfo, record: Mapping[str, Any], settings: Mapping[str, Any]) -> Clip:
    uri = folder.uri_of(info.path)
    if record:
        height, width = _pair(record.get("image_size"))
        return Clip(
            info, uri, prompt=_text(record.get("prompt")), seed=_number(record.get("seed")),
            num_frames=_number(record.get("num_frames")), height=height, width=width, fps=record.get("save_fps"),
        )  # fmt: skip
    prompts, number = settings.get("prompts"), info.path.partition(".")[0]
    if not isinstance(prompts, Sequence) or not number.isdigit():
        return Clip(info, uri)
    height, width = _pair(settings.get("image_size"))
    prompt = _text(prompts[int(number)]) if int(number) < len(prompts) else None
    return Clip(
        info, uri, prompt=prompt, seed=_number(settings.get("seed")), num_frames=_number(settings.get("num_frames")),
        height=height, width=width, fps=settings.get("fps"),
    )  # fmt: skip


def _settings(run: Storage) -> Mapping[str, Any]:
    """What the run's config says about its samples; empty where it cannot be read."""
    import yaml  # slow to import

    try:
        config = yaml.safe_load(run.read(CONFIG_PATH))
    except (ObjectNotFoundError, yaml.YAMLError):
        return {}
    samples = config.get("samples") if isinstance(config, dict) else None
    return samples if isinstance(samples, dict) else {}


def _pair(value: Any) -> tuple[int | None, int | None]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(entry, int) for entry in value):
        return value[0], value[1]
    return None, None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def captions(clips: Sequence[Clip]) -> Iterator[str]:
    """What stands beside each clip: its prompt, or else the name of its file."""
    for clip in clips:
        yield clip.prompt or clip.info.path
