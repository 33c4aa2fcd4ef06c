"""One measurement: a few real training steps with one batch size, in a process of its own.

`python -m opensora.batch_search.probe REQUEST.json`, one process for each rank, started by the launcher. The trainer is
the one that trains; only the clips are made up, of the largest shape of the bucket and with the longest captions. An
empty batch is the step of a rank without clips: what is left when that is taken off is what the clips took.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from opensora import __version__, records
from opensora.config.load import parse_train_config
from opensora.config.train import (
    CheckpointConfig,
    DataConfig,
    ReportConfig,
    SamplesConfig,
    TrainConfig,
    ValidationConfig,
)
from opensora.datasets.batch_table import micro_batches_per_rank
from opensora.datasets.bucket import Bucket, BucketShape
from opensora.datasets.cost import clip_tokens
from opensora.errors import ExitCode, OpenSoraError, UsageError
from opensora.storage import Storage
from opensora.training.position import Position

if TYPE_CHECKING:  # torch takes seconds to import; what is wrong with a request is told before
    import torch

    from opensora.acceleration.mesh import World
    from opensora.datasets.loader import ClipBatch, StepWork
    from opensora.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What to measure."""

    config: str
    """The training config, as YAML."""
    bucket: str
    """`240p/51`"""
    batch_size: int
    """Clips per micro-batch; 0 measures the empty batch."""
    untimed_steps: int
    timed_steps: int


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What was measured, and on what."""

    peak_bytes: int
    """Most memory that a rank took; that of its device, or all of its process on a CPU."""
    seconds_per_step: float
    """Median of the timed steps."""
    accelerator: str
    """Name of the device."""
    device_bytes: int | None
    """Memory of the device; None on a CPU."""
    ranks: int
    versions: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what a request file asks for; rank 0 writes the result beside it. Returns the exit code."""
    gc.disable()  # looking for garbage while modules load takes a second
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    position = Position(0)
    try:
        request_path = Path((sys.argv[1:] if arguments is None else arguments)[0])
        request = ProbeRequest(**json.loads(request_path.read_bytes()))
        result = measure(request, scratch=request_path.parent, position=position)
        if result is not None:
            request_path.with_name("result.json").write_text(json.dumps(asdict(result)))
    except Exception as error:
        record = position.failed(error)
        records.write_end_record(record)
        logger.error("%s", error if isinstance(error, OpenSoraError) else "\n".join(record.last_words))
        return record.code
    return ExitCode.DONE


def load_modules() -> None:
    """Import what a measurement imports."""
    for name in (
        "opensora.acceleration.mesh",
        "opensora.training.trainer",
        "opensora.training.batch_sizes",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)


def measure(request: ProbeRequest, *, scratch: Path, position: Position) -> ProbeResult | None:
    """Take the steps; the result is rank 0's, the others have None.

    Raises:
        OutOfMemoryError: the batch does not fit.
        OpenSoraError: something else is wrong.
    """
    config = parse_train_config(request.config, source="request")
    shape = largest_shape(config, request.bucket)
    from opensora.acceleration.mesh import init_world
    from opensora.training.failures import translated

    with translated(" while the ranks met"):
        world = init_world(config.parallel, device=config.device)
    position.rank = world.rank
    trained = probe_config(config, shape, max(request.batch_size, 1), scratch=scratch, ranks=world.size)
    if world.is_main:
        _write_catalogue(Path(trained.data.path), shape, frame_interval=config.data.frame_interval)
    world.barrier()
    with translated(f" with {request.batch_size} clips of {shape.name}"):
        trainer = _build_trainer(trained, world, position)
        gc.freeze()
        gc.enable()  # as in training: memory that only cycles hold is taken, too, until they are found
        seconds = [
            _timed_step(trainer, shape, request.batch_size, number, world.device)
            for number in range(request.untimed_steps + request.timed_steps)
        ]
        peak = max(world.gather(_peak_bytes(world.device)))
    if not world.is_main:
        world.close()
        return None
    result = _describe(world, peak, statistics.median(seconds[request.untimed_steps :]))
    world.close()
    return result


def largest_shape(config: TrainConfig, bucket: str) -> BucketShape:
    """The shape of a bucket that takes most memory; there is one for each aspect ratio.

    Raises:
        UsageError: `data.bucket_config` has no such bucket.
    """
    shapes = [s for s in Bucket(config.data.bucket_config).entries if f"{s.resolution}/{s.num_frames}" == bucket]
    if not shapes:
        raise UsageError(f"there is no bucket {bucket!r} in data.bucket_config", hint="name one such as 240p/51")

    def size(shape: BucketShape) -> tuple[int, int]:
        time_, space = clip_tokens(
            num_frames=shape.num_frames, height=shape.height, width=shape.width, model=config.model
        )
        return time_ * space, shape.height * shape.width

    return max(shapes, key=size)


def probe_config(config: TrainConfig, shape: BucketShape, batch_size: int, *, scratch: Path, ranks: int) -> TrainConfig:
    """The same training, with this bucket alone, in a run directory of its own, without anything around the steps."""
    data = DataConfig(
        path=str(scratch / "catalogue.csv"),
        bucket_config={shape.resolution: {shape.num_frames: (1.0, batch_size)}},
        frame_interval=config.data.frame_interval,
        transform=config.data.transform,
        drop_last=False,
    )
    per_step = ranks * micro_batches_per_rank(config, ranks=ranks)
    return replace(
        config,
        run_uri=str(scratch / "run"),
        model=replace(config.model, from_pretrained=None),
        data=data,
        train=replace(config.train, micro_batches_per_step=per_step),
        checkpoint=CheckpointConfig(every_steps=0, export=False),
        validation=ValidationConfig(),
        samples=SamplesConfig(),
        report=ReportConfig(),
    )


def _write_catalogue(path: Path, shape: BucketShape, *, frame_interval: int) -> None:
    """A clip that the bucket takes. It is never read: the trainer only wants to see that there is something."""
    frames = 1 if shape.num_frames == 1 else shape.num_frames * frame_interval + 1
    name = "clip.png" if frames == 1 else "clip.mp4"
    path.write_text(f"path,text,num_frames,height,width\n{name},a clip,{frames},{shape.height},{shape.width}\n")


def _build_trainer(config: TrainConfig, world: World, position: Position) -> Trainer:
    from opensora.training.control import StopControl
    from opensora.training.trainer import Trainer, build_parts
    from opensora.training.watchdog import Watchdog

    watchdog = Watchdog(config.watchdog, clock=position.clock, on_stall=lambda *_: None)
    watchdog.stop()  # whoever asked for the measurement knows how long it may take
    return Trainer(
        config, world=world, run=Storage(config.run_uri), attempt=1, control=StopControl(position), position=position,
        watchdog=watchdog, parts=build_parts(config, world.device),
    )  # fmt: skip


def _timed_step(trainer: Trainer, shape: BucketShape, batch_size: int, number: int, device: torch.device) -> float:
    started = time.perf_counter()
    trainer.train_step(_work(trainer, shape, batch_size, number))
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _work(trainer: Trainer, shape: BucketShape, batch_size: int, number: int) -> StepWork:
    """This rank's share of a step: its micro-batches, all of one size, or none."""
    import numpy as np

    from opensora.datasets.loader import StepWork
    from opensora.datasets.plan import MicroBatch

    count = trainer.micro_batches_per_step // trainer.world.size if batch_size else 0
    rows = np.zeros(batch_size, np.int64)
    parts = [MicroBatch(index=index, shape=shape, rows=rows, cost=1.0) for index in range(count)]
    clips = _clip_maker(trainer, shape, batch_size)
    return StepWork(epoch=0, step=number, micro_batches=parts, num_slots=max(1, count), _take=clips)


def _clip_maker(trainer: Trainer, shape: BucketShape, batch_size: int) -> Callable[[Callable[[], bool]], ClipBatch]:
    import torch

    from opensora.datasets.loader import ClipBatch

    config = trainer.config
    caption = " ".join(f"word{index}" for index in range(config.text_encoder.model_max_length))

    def fill(value: float) -> torch.Tensor:
        return torch.full((batch_size,), float(value))

    def take(_: Callable[[], bool]) -> ClipBatch:
        video = torch.empty(batch_size, 3, shape.num_frames, shape.height, shape.width)
        return ClipBatch(
            shape=shape,
            rows=[0] * batch_size,
            ids=list(range(batch_size)),
            epoch=0,
            video=video.uniform_(-1, 1),
            text=[caption] * batch_size,
            fps=fill(120 if shape.num_frames == 1 else 24),
            height=fill(shape.height),
            width=fill(shape.width),
            num_frames=fill(shape.num_frames),
            ar=fill(shape.height / shape.width),
            skipped=[],
        )

    return take


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        # What the caching allocator has taken: with gaps, this and not what is in use meets the device's limit.
        return torch.cuda.max_memory_reserved(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far.

    `ru_maxrss` will not do on Linux: a process inherits it from the one that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _describe(world: World, peak_bytes: int, seconds: float) -> ProbeResult:
    import torch

    from opensora.training.batch_sizes import accelerator_name

    versions = {"opensora": __version__, "torch": torch.__version__}
    if world.device.type != "cuda":
        return ProbeResult(
            peak_bytes=peak_bytes, seconds_per_step=seconds, accelerator=accelerator_name(world.device),
            device_bytes=None, ranks=world.size, versions=versions,
        )  # fmt: skip
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return ProbeResult(
        peak_bytes=peak_bytes, seconds_per_step=seconds, accelerator=accelerator_name(world.device),
        device_bytes=memory, ranks=world.size, versions={**versions, "cuda": str(torch.version.cuda)},
    )  # fmt: skip


if __name__ == "__main__":
    # Without C++ destructors: those of gloo's threads abort the process now and then.
    import os

    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
