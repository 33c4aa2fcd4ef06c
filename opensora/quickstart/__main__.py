"""The quickstart: `python -m opensora.quickstart` trains a small model on real clips, and checks what it has learnt.

It starts an object store on this machine, puts clips into it, trains on two ranks, kills the run half-way, resumes it,
samples a clip for each caption, and compares those with the clips. Exit code 0 says that every one came out right. What
is there already is not made again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from opensora import records
from opensora.config.load import load_train_config
from opensora.config.train import TrainConfig
from opensora.errors import DataError, ExitCode, OpenSoraError, UsageError
from opensora.quickstart.clips import CATALOGUE, Clip, prepare_clips
from opensora.quickstart.object_store import ObjectStore
from opensora.quickstart.training import NUM_RANKS, is_finished, read_progress, run_program, train, train_until_killed
from opensora.storage import Storage

CONFIG = Path(__file__).parents[2] / "configs/stdit3/train/quickstart.yaml"
_BUCKET = "quickstart"
_CLIPS_URI = f"s3://{_BUCKET}/clips"
_FEWEST_STEPS_TO_KILL = 20
"""A run of fewer steps is over before it could be killed half-way."""
_MAX_FOLDERS = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = _parse(arguments)
        with _own_folder(options.folder) as folder, ObjectStore(folder / "store") as store:
            _use(store)
            return ExitCode.DONE if Quickstart(folder, store, console, steps=options.steps).run() else ExitCode.FAILED
    except OpenSoraError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False)
        return int(error.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted, nothing is left running; the same command continues")
        return ExitCode.INTERRUPTED
    finally:
        console.show_cursor()


class Quickstart:
    """One run of it.

    Args:
        folder: where everything is kept.
        store: the running object store.
        console: where to tell.
        steps: training steps; those of the config unless given.
    """

    def __init__(self, folder: Path, store: ObjectStore, console: Console, *, steps: int | None) -> None:
        self.folder, self.store, self.console = folder, store, console
        self.config: TrainConfig = load_train_config(str(CONFIG))
        self.steps = steps or self.config.train.steps or 0
        self.run_name = f"run-{self.steps}-steps"
        self.started = time.monotonic()

    def run(self) -> bool:
        """All of it; returns whether every sampled clip is nearest to the clip with its caption."""
        self._say(f"object store: SeaweedFS at {self.store.endpoint_url}, data in {self.folder / 'store'}")
        clips = prepare_clips(self.folder / "clips")
        self._upload(clips)
        self._check_codec(clips)
        run = Storage(f"s3://{_BUCKET}/{self.run_name}")
        self._train(run)
        samples = self._sample(run, clips)
        self._fetch_tensorboard(run)
        self._say("results")
        self.console.print(f"  clips         {samples}/*.mp4")
        self.console.print(f"  contact sheet {samples / 'sheet.png'}")
        self.console.print(
            f"  run           {run.uri} (in the object store), its files for reading in {self.local_run}"
        )
        self.console.print(f"  metrics       {self.local_run / 'metrics'}")
        logs = self.local_run / records.TENSORBOARD_PREFIX
        self.console.print(f"  TensorBoard   {sys.executable} -m tensorboard.main --logdir {logs}")
        return self._check_samples(clips, samples)

    @property
    def local_run(self) -> Path:
        """Where what a person may want to read of the run is copied to."""
        return self.folder / self.run_name

    def _say(self, text: str) -> None:
        self.console.print(f"[{time.monotonic() - self.started:4.0f} s] {text}", style="bold", markup=False)

    def _upload(self, clips: Sequence[Clip]) -> None:
        self.store.create_bucket(_BUCKET)
        target = Storage(_CLIPS_URI)
        # The catalogue last: where it is, all its clips are.
        paths = [*(clip.path for clip in clips), self.folder / "clips" / CATALOGUE]
        for path in paths:
            target.write(path.name, path.read_bytes())
        self._say(f"{len(clips)} clips and their catalogue are in {_CLIPS_URI}")

    def _check_codec(self, clips: Sequence[Clip]) -> None:
        """A clip that the codec alone makes unrecognisable could not be learnt.

        Raises:
            DataError: there is one.
        """
        from opensora.models.vae.codec import VideoCodec  # imports torch, which takes seconds
        from opensora.quickstart.check import compare, round_trips

        pixels = self._read(clips)
        codec = VideoCodec(channels=self.config.vae.channels)
        decoded = round_trips(pixels, codec, num_frames=self.config.samples.num_frames)
        result = compare(_names(clips), decoded, pixels)
        if not result.all_right:
            self.console.print(result.table())
            raise DataError("after a round trip through the codec not every clip is nearest to itself")
        self._say(f"round trip through the codec: {result.num_right} of {len(clips)} clips are nearest to themselves")

    def _train(self, run: Storage) -> None:
        if is_finished(run, steps=self.steps):
            self._say(f"{run.uri} is finished ({self.steps} steps)")
            return
        before_half = read_progress(run).get("step", 0) <= self.steps // 2
        if before_half and self.steps >= _FEWEST_STEPS_TO_KILL:
            self._say(f"training a small STDiT3: {self.steps} steps on {NUM_RANKS} ranks, {run.uri}")
            kill = train_until_killed(str(CONFIG), run, steps=self.steps)
            if kill is not None:
                self.console.print()
                launcher, *ranks = kill.pids
                self._say(
                    f"killed with SIGKILL after step {kill.step}: launcher {launcher} and with it "
                    f"{', '.join(map(str, ranks))}; resuming from step {kill.checkpoint_step} or a later checkpoint"
                )
        else:
            self._say(f"training {run.uri} up to step {self.steps}")
        if not is_finished(run, steps=self.steps):
            train(str(CONFIG), run, steps=self.steps)
        self._say(f"trained {self.steps} steps in {records.newest_attempt(run)} attempts")

    def _sample(self, run: Storage, clips: Sequence[Clip]) -> Path:
        """One clip per caption, named after the training clip."""
        target = self.local_run / "samples"
        self._say(f"sampling {len(clips)} clips, one per caption")
        run_program(
            "opensora.sample", "--run", run.uri, "--save-dir", str(target), "--batch-size", str(len(clips)),
            "--prompt", *(clip.caption for clip in clips), "clean_prompts=false",
        )  # fmt: skip
        return target

    def _fetch_tensorboard(self, run: Storage) -> None:
        """Copy metrics and TensorBoard files to where they can be read once the store has stopped."""
        for folder in ("metrics", records.TENSORBOARD_PREFIX):
            for item in run.list(folder):
                local = self.local_run / item.path
                local.parent.mkdir(parents=True, exist_ok=True)
                run.download(item.path, local)

    def _check_samples(self, clips: Sequence[Clip], samples: Path) -> bool:
        from opensora.quickstart.check import compare, read_clip_pixels

        height, width = self.config.samples.image_size
        sampled = [
            read_clip_pixels(str(samples / f"sample_{number:04d}.mp4"), height=height, width=width)
            for number in range(len(clips))
        ]
        result = compare(_names(clips), sampled, self._read(clips))
        self.console.print(result.table())
        outcome = f"{result.num_right} of {len(clips)} sampled clips are nearest to the clip with their caption"
        self._say(outcome)
        return result.all_right

    def _read(self, clips: Sequence[Clip]) -> list[Any]:
        from opensora.quickstart.check import read_clip_pixels

        height, width = self.config.samples.image_size
        return [read_clip_pixels(str(clip.path), height=height, width=width) for clip in clips]


def _names(clips: Sequence[Clip]) -> list[str]:
    return [clip.path.stem for clip in clips]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opensora.quickstart", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="where to keep everything (default: ./quickstart-run, or the "
                        "first of ./quickstart-run-2, -3, … while others are in use)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="training steps (default: those of the config)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        raise UsageError(f"--steps {options.steps} is below 1", hint="use a whole number from 1")
    return options


@contextmanager
def _own_folder(wanted: Path | None) -> Iterator[Path]:
    """A folder that no other quickstart uses while this one does.

    Raises:
        UsageError: another one uses it.
    """
    default = Path("quickstart-run")
    candidates = [wanted] if wanted else [default, *(Path(f"{default}-{n}") for n in range(2, _MAX_FOLDERS))]
    for folder in candidates:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder.resolve()
            return
    raise UsageError(f"another quickstart is using {candidates[0]}", hint="wait for it, or choose another --folder")


def _use(store: ObjectStore) -> None:
    """Make this process and those it starts use this store and no other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(store.environment())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
