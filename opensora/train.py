"""Entry point of training: `python -m opensora.train CONFIG [key=value …]`, alone or on several ranks.

The outcome is the exit code (`opensora.errors.ExitCode`), and an end record for the launcher.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console

from opensora import records
from opensora.config.flags import parse_train_command
from opensora.config.load import load_train_config
from opensora.config.train import TrainConfig
from opensora.errors import ExitCode, OpenSoraError
from opensora.storage import Storage
from opensora.training.clock import Clock
from opensora.training.control import StopControl

logger = logging.getLogger(__name__)

_DUMP_SECONDS = 20.0
"""How long the upload of a dump may take."""


class Position:
    """Where a rank stands, for its end record."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step: int | None = None
        self.bucket: str | None = None
        self.samples: list[str] = []


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit code."""
    position = Position(int(os.environ.get(records.RANK, "0")))
    clock = Clock()
    control = StopControl(rank=position.rank, clock=clock)
    control.install()
    _log_to_stderr(position.rank)
    try:
        command = parse_train_command(sys.argv[1:] if arguments is None else arguments)
        config = load_train_config(command.config, command.overrides, flags=command.flags)
        run(config, clock=clock, control=control, position=position)
    except Exception as error:
        return _report(error, clock=clock, control=control, position=position)
    return ExitCode.DONE


def run(config: TrainConfig, *, clock: Clock, control: StopControl, position: Position) -> None:
    """Join the other ranks and train.

    Raises:
        OpenSoraError: what ended the run.
    """
    storage = Storage(config.run_uri, config=config.storage)
    # torch takes seconds to import; mistakes in the settings are told before.
    from opensora.acceleration.mesh import init_world
    from opensora.sampling.rounds import RoundSampler
    from opensora.training.failures import translated
    from opensora.training.trainer import COMPUTE_DTYPES, Trainer, build_parts
    from opensora.training.watchdog import Watchdog

    def on_stall(reason: str, stacks: str) -> None:
        _end_stalled(storage, attempt, reason, stacks, clock=clock, position=position)

    with translated(" while the ranks met"):
        world = init_world(config.parallel, device=config.device)
    if world.is_main:
        storage.check_access(write=True)
    attempt = world.broadcast(records.own_attempt(storage) if world.is_main else 0)
    watchdog = Watchdog(config.watchdog, clock=clock, on_stall=on_stall)
    parts = build_parts(config, world.device)
    sampler = RoundSampler(
        config.samples, run=storage, ranks=world, vae=parts.vae, text_encoder=parts.text_encoder,
        scheduler=parts.scheduler, dtype=COMPUTE_DTYPES[config.dtype],
    )  # fmt: skip
    with translated():
        trainer = Trainer(
            config, world=world, run=storage, attempt=attempt, control=control, clock=clock, watchdog=watchdog,
            parts=parts, sampler=sampler,
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            position.step = trainer.step
            if trainer.current is not None:
                position.bucket = trainer.current.shape.name
                position.samples = [trainer.catalogue.row_path(row) for row in trainer.current.rows]
        world.close()


def _report(error: Exception, *, clock: Clock, control: StopControl, position: Position) -> int:
    """Say how the rank ended: to a person and to the launcher."""
    record = records.EndRecord.from_exception(
        error, rank=position.rank, phase=clock.phase, step=position.step, bucket=position.bucket,
        samples=position.samples,
    )  # fmt: skip
    code = int(control.exit_code) if record.code == ExitCode.STOPPED else record.code
    if isinstance(error, OpenSoraError):
        console = Console(stderr=True)
        label = "stopped" if record.code == ExitCode.STOPPED else "error"
        console.print(f"{label}: {error.message}", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
    else:
        logger.error("%s", "\n".join(record.last_words))
    records.write_end_record(record)
    return code


def _end_stalled(storage: Storage, attempt: int, reason: str, stacks: str, *, clock: Clock, position: Position) -> None:
    """Write down where the threads stand, and end the process: a stalled thread cannot be ended in order."""
    sys.stderr.write(f"error: stalled: {reason}\n{stacks}\n")
    sys.stderr.flush()
    error = records.EndRecord(
        rank=position.rank, time=time.time(), code=int(ExitCode.STALLED), reason="StalledError", message=reason,
        phase=clock.phase, step=position.step, last_words=stacks.splitlines()[-records.MAX_LAST_WORDS :],
    )  # fmt: skip
    records.write_end_record(error)
    path = f"{records.dumps_prefix(attempt)}/rank-{position.rank}.txt"
    upload = threading.Thread(target=storage.write, args=(path, f"{reason}\n\n{stacks}".encode()), daemon=True)
    upload.start()
    upload.join(_DUMP_SECONDS)
    os._exit(ExitCode.STALLED)


def _log_to_stderr(rank: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    package = logging.getLogger("opensora")
    package.addHandler(handler)
    # Rank zero reports, all ranks may fail.
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _exit(code: int) -> None:
    """Leave without C++ destructors: those of gloo's threads abort the process now and then, and hide its code."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
