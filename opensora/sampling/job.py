"""A sampling job: all clips of a config, in batches, written one by one, continued where it stopped.

A clip is `NAME.mp4` or `NAME.png`, and complete once `NAME.json` says how it was made; that file is written last. A
later job leaves clips alone that were made in the same way, and makes the others anew.

A job can be split into parts that never talk to each other: shards, and the ranks of each. What is sampled together in
one process is sampled together in a part, so that the parts make the same files, bit by bit. Each part leaves
`index/PART-of-PARTS.json` behind when its clips are there, and the last one makes the contact sheet.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.config.sample import SampleConfig
from opensora.datasets.reader import Video, read_image
from opensora.errors import DataError, DivergedError, ObjectNotFoundError, OutOfMemoryError
from opensora.sampling.pipeline import SampleKey
from opensora.sampling.prompts import extract_json_from_prompts, load_prompts, prepare_prompt
from opensora.sampling.references import collect_references_batch, parse_mask_strategy
from opensora.sampling.source import Source
from opensora.sampling.video_io import to_frames, write_image, write_video
from opensora.sheet import SheetRow, contact_sheet, pick_frames, sheet_row
from opensora.storage import Storage

logger = logging.getLogger(__name__)

MAX_SHEET_ROWS = 64
"""Clips on a contact sheet; a larger job shows its first ones."""
INDEX_PREFIX = "index"
"""Folder of what the parts of a job say."""
_READ_THREADS = 8
_LONGEST_NAME = 200
"""Bytes of a file name that is a prompt; most file systems allow 255 in all."""


@dataclass(frozen=True)
class Clip:
    """One result."""

    name: str
    """Path in the folder of results, without extension."""
    index: int
    """Number of its prompt, counted from the beginning of the file."""
    draw: int
    """Which of the clips of this prompt."""
    prompt: str
    """As given, without JSON."""
    text: str
    """What is encoded: with scores, cleaned, with loop marks."""
    reference_path: str
    mask_strategy: str

    @property
    def record_path(self) -> str:
        return f"{self.name}.json"


@dataclass(frozen=True)
class Part:
    """A share of a job."""

    number: int = 0
    """From 0."""
    count: int = 1
    """Parts in all."""

    @classmethod
    def of(cls, *, shard: int, num_shards: int, rank: int, num_ranks: int) -> Self:
        """The part of one rank of a shard."""
        return cls(shard * num_ranks + rank, num_shards * num_ranks)

    def index_path(self, sample_name: str | None) -> str:
        """Where it says what it has made."""
        prefix = f"{sample_name}_" if sample_name else ""
        return f"{INDEX_PREFIX}/{prefix}{self.number:04d}-of-{self.count:04d}.json"


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    """Clips written."""
    total: int
    """Clips to make, those that were there already left out."""
    steps: int
    """Model steps of the present batch."""
    steps_total: int
    clips_in_batch: int


@dataclass(frozen=True)
class Outcome:
    """What a job has left behind."""

    made: int
    found: int
    """Clips that were there already."""
    rows: list[SheetRow]
    """The contact sheet's rows; empty where none was asked for."""
    sheet_uri: str | None


def list_clips(config: SampleConfig) -> list[Clip]:
    """All clips of a config, in the order in which they are made.

    Raises:
        DataError: the prompts cannot be read or understood, or two clips would have the same name.
    """
    if config.prompt is not None:
        prompts = list(config.prompt)
    else:
        assert config.prompt_path is not None, "checked by the config"
        prompts = load_prompts(config.prompt_path, config.start_index, config.end_index, config=config.storage)
    references = _per_prompt(config.reference_path, len(prompts), "reference_path")
    strategies = _per_prompt(config.mask_strategy, len(prompts), "mask_strategy")
    prompts, references, strategies = extract_json_from_prompts(prompts, references, strategies)
    for strategy in strategies:
        parse_mask_strategy(strategy)  # now, not in the middle of the job
    clips = []
    for i, prompt in enumerate(prompts):
        text = prepare_prompt(
            prompt, aes=config.aes, flow=config.flow, camera_motion=config.camera_motion, clean=config.clean_prompts
        )
        index = config.start_index + i
        for draw in range(config.num_sample):
            name = _name(config, prompt, index) + (f"-{draw}" if config.num_sample > 1 else "")
            clips.append(Clip(name, index, draw, prompt, text, references[i], strategies[i]))
    doubled = [name for name, count in Counter(clip.name for clip in clips).items() if count > 1]
    if doubled:
        raise DataError(f"two clips would be named {doubled[0]!r}", hint="leave out --prompt-as-path, or one prompt")
    return clips


def take_part(clips: Sequence[Clip], part: Part, *, batch_size: int) -> list[Clip]:
    """The clips of a part: every `count`-th batch of those that one process would make."""
    batches = list(_batches(clips, batch_size))
    return [clip for batch in batches[part.number :: part.count] for clip in batch]


def _per_prompt(values: Sequence[str] | None, count: int, name: str) -> list[str]:
    if values is None:
        return [""] * count
    if len(values) != count:
        raise DataError(f"{name} has {len(values)} entries for {count} prompts", hint='one entry a prompt; "" for none')
    return list(values)


def _name(config: SampleConfig, prompt: str, index: int) -> str:
    if not config.prompt_as_path:
        return f"{config.sample_name or 'sample'}_{index:04d}"
    name = (config.sample_name or "") + prompt.strip().replace("/", "_").replace("\0", "_").lstrip(".")
    encoded = name.encode()
    if len(encoded) > _LONGEST_NAME:
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        name = f"{encoded[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name or f"sample_{index:04d}"


class SampleJob:
    """Makes the clips of a config from a source."""

    def __init__(
        self,
        config: SampleConfig,
        source: Source,
        *,
        part: Part = Part(),
        on_progress: Callable[[Progress], None] | None = None,
        on_clip: Callable[[Clip, str], None] | None = None,
    ) -> None:
        """Nothing is made yet.

        Args:
            config: what to make.
            source: from what.
            part: which share of it.
            on_progress: told after every step and clip. What it raises ends the job; what is written stays.
            on_clip: told of every clip that has been written, with its URI.
        """
        self.config = config
        self.source = source
        self.part = part
        self.all_clips = list_clips(config)
        self.clips = take_part(self.all_clips, part, batch_size=config.batch_size)
        self.storage = Storage(config.save_dir, config=config.storage)
        self.extension = ".png" if source.num_frames == 1 and config.loop == 1 else ".mp4"
        self.save_fps = config.save_fps or max(source.fps // config.frame_interval, 1)
        self._on_progress = on_progress or (lambda _: None)
        self._on_clip = on_clip or (lambda *_: None)

    def run(self) -> Outcome:
        """Make what is missing.

        Raises:
            DataError: a reference or mask strategy cannot be used.
            DivergedError: the model's output is not finite.
            OutOfMemoryError: a batch does not fit.
        """
        missing = self._find_missing()
        rows: dict[str, SheetRow] = {}
        shown = {clip.name for clip in self.all_clips[:MAX_SHEET_ROWS]} if self.config.sheet else set()
        done = 0
        for batch in _batches(missing, self.config.batch_size):
            pixels = self._sample(batch, partial(self._report, done, missing, batch))
            for clip, x in zip(batch, pixels, strict=True):
                frames = self._write(clip, x)
                if clip.name in shown:
                    rows[clip.name] = sheet_row(clip.prompt, frames)
                done += 1
                self._on_clip(clip, self.storage.uri_of(clip.name + self.extension))
        self._report(done, missing, [], 0)
        return self._finish(rows, made=done, found=len(self.clips) - len(missing))

    def _find_missing(self) -> list[Clip]:
        """Clips without a record, or with one that tells of other settings."""
        names = set(self.storage.list_names())
        candidates = [clip for clip in self.clips if {clip.record_path, clip.name + self.extension} <= names]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            same = list(pool.map(self._has_same_record, candidates))
        complete = {clip.name for clip, is_same in zip(candidates, same, strict=True) if is_same}
        if len(complete) < len(candidates):
            logger.info("%d clips were made with other settings and are made anew", len(candidates) - len(complete))
        return [clip for clip in self.clips if clip.name not in complete]

    def _has_same_record(self, clip: Clip) -> bool:
        try:
            return bool(json.loads(self.storage.read(clip.record_path)) == self._record(clip))
        except (ObjectNotFoundError, ValueError):
            return False

    def _record(self, clip: Clip) -> dict[str, Any]:
        """All that decides what a clip looks like, but for the content of its references."""
        config, source = self.config, self.source
        return {
            "weights": source.weights,
            "prompt": clip.prompt,
            "text": clip.text,
            "seed": config.seed,
            "index": clip.index,
            "draw": clip.draw,
            "reference_path": clip.reference_path,
            "mask_strategy": clip.mask_strategy,
            "align": config.align,
            "num_frames": source.num_frames,
            "image_size": list(source.image_size),
            "fps": source.fps,
            "save_fps": self.save_fps,
            "multi_resolution": config.multi_resolution,
            "num_sampling_steps": source.num_sampling_steps,
            "cfg_scale": source.cfg_scale,
            "dtype": str(source.pipeline.dtype).removeprefix("torch."),
            "loop": config.loop,
            "condition_frame_length": config.condition_frame_length,
            "condition_frame_edit": config.condition_frame_edit,
        }

    def _sample(self, batch: Sequence[Clip], on_step: Callable[[int], None]) -> Tensor:
        config, source, pipeline = self.config, self.source, self.source.pipeline
        on_step(0)
        try:
            return pipeline.sample(
                [clip.text for clip in batch],
                num_frames=source.num_frames,
                image_size=source.image_size,
                fps=source.fps,
                keys=[SampleKey(seed=config.seed, row=clip.index, draw=clip.draw) for clip in batch],
                num_sampling_steps=source.num_sampling_steps,
                cfg_scale=source.cfg_scale,
                multi_resolution=config.multi_resolution,
                references=collect_references_batch(
                    [clip.reference_path for clip in batch], pipeline.vae, source.image_size
                ),
                mask_strategies=[clip.mask_strategy for clip in batch],
                align=config.align,
                loop=config.loop,
                condition_frame_length=config.condition_frame_length,
                condition_frame_edit=config.condition_frame_edit,
                on_step=lambda step, _: on_step(step),
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{len(batch)} clips of {source.num_frames} frames of {source.image_size} pixels do not fit at once",
                hint="lower --batch-size, the size or the number of frames",
            ) from error

    def _write(self, clip: Clip, pixels: Tensor) -> NDArray[np.uint8]:
        if not bool(pixels.isfinite().all()):
            raise DivergedError(
                f"{clip.name}: the model's output is not finite", hint="try dtype=fp32 or a lower --cfg-scale"
            )
        frames = to_frames(pixels)
        self.storage.delete(clip.record_path)  # what it tells of is about to be replaced
        if self.extension == ".png":
            write_image(self.storage, clip.name + self.extension, frames[0])
        else:
            write_video(self.storage, clip.name + self.extension, frames, self.save_fps)
        self.storage.write(clip.record_path, json.dumps(self._record(clip), indent=1, ensure_ascii=False).encode())
        return frames

    def _finish(self, rows: dict[str, SheetRow], *, made: int, found: int) -> Outcome:
        if self.part.count > 1:
            self._write_index()
        if not self.config.sheet or not self._is_complete():
            return Outcome(made, found, [], None)
        ordered = [
            rows[clip.name] if clip.name in rows else _read_row(self.storage, clip, self.extension)
            for clip in self.all_clips[:MAX_SHEET_ROWS]
        ]
        return Outcome(made, found, ordered, _write_sheet(self.storage, self.config, ordered))

    def _digest(self) -> str:
        """Of the whole job: the same in all of its parts, and in no other job."""
        records = [self._record(clip) for clip in self.all_clips]
        return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()

    def _write_index(self) -> None:
        clips = [
            {"file": clip.name + self.extension, "prompt": clip.prompt, "index": clip.index, "draw": clip.draw}
            for clip in self.clips
        ]
        index = {"job": self._digest(), "part": self.part.number, "parts": self.part.count, "clips": clips}
        path = self.part.index_path(self.config.sample_name)
        self.storage.write(path, json.dumps(index, indent=1, ensure_ascii=False).encode())

    def _is_complete(self) -> bool:
        """Whether all parts of this job have ended. The last one sees the others, since each writes before it looks."""
        if self.part.count == 1:
            return True
        parts = [Part(number, self.part.count) for number in range(self.part.count)]
        paths = [part.index_path(self.config.sample_name) for part in parts]
        if not {path.rpartition("/")[2] for path in paths} <= set(self.storage.list_names(INDEX_PREFIX)):
            return False
        digest = self._digest()
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return all(pool.map(lambda path: json.loads(self.storage.read(path)).get("job") == digest, paths))

    def _report(self, done: int, missing: Sequence[Clip], batch: Sequence[Clip], step: int) -> None:
        steps_total = self.source.num_sampling_steps * self.config.loop
        self._on_progress(Progress(done, len(missing), step, steps_total, len(batch)))


def make_sheet(config: SampleConfig) -> Outcome:
    """Make the contact sheet of a job whose clips are there; nothing is sampled, and no weights are read.

    Raises:
        DataError: clips are missing.
    """
    storage = Storage(config.save_dir, config=config.storage)
    clips = list_clips(config)
    names = set(storage.list_names())
    extensions = {
        clip.name: next((e for e in (".mp4", ".png") if {clip.record_path, clip.name + e} <= names), None)
        for clip in clips
    }
    missing = [name for name, extension in extensions.items() if extension is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(clips)} clips are not in {storage.uri} yet, the first of them {missing[0]}",
            hint="sample them first: the same command without --sheet-only",
        )
    rows = [_read_row(storage, clip, str(extensions[clip.name])) for clip in clips[:MAX_SHEET_ROWS]]
    return Outcome(0, len(clips), rows, _write_sheet(storage, config, rows))


def _write_sheet(storage: Storage, config: SampleConfig, rows: list[SheetRow]) -> str:
    path = f"{config.sample_name}_sheet.png" if config.sample_name else "sheet.png"
    write_image(storage, path, contact_sheet(rows))
    return storage.uri_of(path)


def _read_row(storage: Storage, clip: Clip, extension: str) -> SheetRow:
    """The row of a clip that another part, or an earlier job, has made."""
    path = clip.name + extension
    if extension == ".png":
        return SheetRow(clip.prompt, np.asarray(read_image(storage, path))[None])
    frames: dict[int, NDArray[np.uint8]] = {}
    with Video(storage, path) as video:
        while not video.read(pick_frames(video.num_frames), lambda i, frame: frames.update({i: np.array(frame)})):
            frames.clear()
    return SheetRow(clip.prompt, np.stack([frames[i] for i in sorted(frames)]))


def _batches(clips: Iterable[Clip], size: int) -> Iterator[list[Clip]]:
    clips = list(clips)
    for start in range(0, len(clips), size):
        yield clips[start : start + size]
