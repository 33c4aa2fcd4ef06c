"""Entry point of training: `python -m opensora.train CONFIG [key=value …]`, alone or on several ranks.

The outcome is the exit code (`opensora.errors.ExitCode`), and an end record for the launcher.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Sequence

from rich.console import Console

from opensora import records
from opensora.config.flags import parse_train_command
from opensora.config.load import load_train_config
from opensora.config.train import TrainConfig
from opensora.errors import ConfigError, ExitCode, OpenSoraError
from opensora.storage import Storage
from opensora.training.control import StopControl
from opensora.training.operator_link import OperatorAddress, OperatorLink, Requests
from opensora.training.position import Position

logger = logging.getLogger(__name__)

_DUMP_SECONDS = 20.0
"""How long the upload of a dump may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit code."""
    # What starting allocates, modules above all, stays: looking for garbage in it costs a second.
    gc.disable()
    position = Position(int(os.environ.get(records.RANK, "0")))
    control = StopControl(position)
    control.install()
    _log_to_stderr(position.rank)
    try:
        command = parse_train_command(sys.argv[1:] if arguments is None else arguments)
        config = load_train_config(command.config, command.overrides, flags=command.flags)
        run(config, control=control, position=position)
    except Exception as error:
        return _report(error, position)
    return ExitCode.DONE


def run(config: TrainConfig, *, control: StopControl, position: Position) -> None:
    """Join the other ranks and train.

    Raises:
        OpenSoraError: what ended the run.
    """
    storage = Storage(config.run_uri, config=config.storage)
    address = OperatorAddress.from_environment(os.environ)
    _check_launcher_has_same_run(storage)
    # torch takes seconds to import; mistakes in the settings are told before.
    from opensora.acceleration.mesh import init_world
    from opensora.sampling.rounds import RoundSampler
    from opensora.training.batch_sizes import use_batch_table
    from opensora.training.failures import translated
    from opensora.training.stack_dumps import StackDumps
    from opensora.training.trainer import COMPUTE_DTYPES, Trainer, build_parts
    from opensora.training.watchdog import Watchdog

    def on_stall(reason: str, stacks: str) -> None:
        _end_stalled(storage, attempt, reason, stacks, position)

    with translated(" while the ranks met"):
        world = init_world(config.parallel, device=config.device)
    if world.is_main:
        storage.check_access(write=True)
    attempt = world.broadcast(records.own_attempt(storage) if world.is_main else 0)
    config = use_batch_table(config, world, storage)
    watchdog = Watchdog(config.watchdog, clock=position.clock, on_stall=on_stall)
    dumps, operator = None, None
    if address is not None:  # the same on all ranks
        dumps = StackDumps(world.store, run=storage, attempt=attempt, size=world.size, position=position)
        if world.is_main:
            requests = Requests(stop=control.ask, dump=dumps.request)
            operator = OperatorLink(address, requests=requests, stop_requested=lambda: control.requested)
    parts = build_parts(config, world.device)
    sampler = RoundSampler(
        config.samples, run=storage, ranks=world, vae=parts.vae, text_encoder=parts.text_encoder,
        scheduler=parts.scheduler, dtype=COMPUTE_DTYPES[config.dtype],
    )  # fmt: skip
    with translated():
        trainer = Trainer(
            config, world=world, run=storage, attempt=attempt, control=control, position=position, watchdog=watchdog,
            parts=parts, sampler=sampler, operator=operator,
        )  # fmt: skip
        if not gc.isenabled():
            gc.freeze()
            gc.enable()
        trainer.train()
        if dumps is not None:
            dumps.stop()
        world.close()


def _check_launcher_has_same_run(run: Storage) -> None:
    told = os.environ.get(records.RUN_URI)
    if told is not None and told != run.uri:
        raise ConfigError(
            f"run_uri is {run.uri}, but the launcher was given --run-uri {told}",
            hint="give the same to both: the attempt is numbered, and its logs and end are kept, in the launcher's",
        )


def _report(error: Exception, position: Position) -> int:
    """Say how the rank ended: to a person and to the launcher."""
    record = position.failed(error)
    if isinstance(error, OpenSoraError):
        console = Console(stderr=True)
        label = "stopped" if record.code == ExitCode.STOPPED else "error"
        console.print(f"{label}: {error.message}", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
    else:
        logger.error("%s", "\n".join(record.last_words))
    records.write_end_record(record)
    return record.code


def _end_stalled(storage: Storage, attempt: int, reason: str, stacks: str, position: Position) -> None:
    """Write down where the threads stand, and end the process: a stalled thread cannot be ended in order."""
    sys.stderr.write(f"error: stalled: {reason}\n{stacks}\n")
    sys.stderr.flush()
    records.write_end_record(
        position.ended(ExitCode.STALLED, reason="stalled", message=reason, last_words=stacks.splitlines())
    )
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
