"""Entry point of sampling: `python -m opensora.sample --run RUN --prompt "a waterfall"`.

The outcome is the exit code (`opensora.errors.ExitCode`). Messages and progress go to stderr, the contact sheet to
stdout where that is a terminal with colours. Started on several ranks (the launcher, torchrun), or as a shard of a
larger job, it makes a share of the clips.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from opensora.config.flags import parse_sample_command
from opensora.config.load import load_sample_config
from opensora.config.sample import SampleConfig, parse_shard
from opensora.errors import ConfigError, ExitCode, OpenSoraError, StopRequestedError, UsageError
from opensora.records import RANK, WORLD_SIZE

if TYPE_CHECKING:
    from opensora.sampling.job import Outcome

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample what the command line asks for; returns the exit code."""
    messages = Console(stderr=True)
    try:
        command = parse_sample_command(sys.argv[1:] if arguments is None else arguments)
        with _logging_to(messages, verbose=1):  # says which keys have no effect
            config = load_sample_config(command.config, command.overrides, flags=command.flags)
        with _logging_to(messages, verbose=config.verbose):
            run(config, messages)
    except OpenSoraError as error:
        messages.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            messages.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        messages.print("interrupted; the same command continues", markup=False)
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def run(config: SampleConfig, messages: Console) -> None:
    """Make the clips of a config and say what was made.

    Raises:
        OpenSoraError: what stopped it; clips that are written stay.
    """
    # torch takes seconds to import; a mistake on the command line is told before.
    from opensora.sampling.job import Clip, Part, Progress, SampleJob, list_clips, make_sheet
    from opensora.sampling.source import load_source

    shard, num_shards = own_shard(config, os.environ)
    list_clips(config)
    if config.sheet_only:
        _show_sheet(make_sheet(config), config)
        return
    source = load_source(config)
    with _progress_bar(messages, shown=config.verbose > 0) as bar, _stop_on_sigterm() as stop:
        task = bar.add_task("", total=None)

        def on_progress(progress: Progress) -> None:
            stop.check()
            share = progress.clips_in_batch * progress.steps / progress.steps_total
            position = f"step {progress.steps} of {progress.steps_total}" if config.verbose > 1 else ""
            bar.update(task, completed=progress.done + share, total=progress.total, description=position)

        def on_clip(clip: Clip, uri: str) -> None:
            logger.info("%s: %s", uri, clip.prompt if config.verbose > 1 else _start_of(clip.prompt))

        rank, num_ranks = int(os.environ.get(RANK, "0")), int(os.environ.get(WORLD_SIZE, "1"))
        part = Part.of(shard=shard, num_shards=num_shards, rank=rank, num_ranks=num_ranks)
        job = SampleJob(config, source, part=part, on_progress=on_progress, on_clip=on_clip)
        outcome = job.run()
    if config.verbose > 0:
        there = f", {outcome.found} were there already" if outcome.found else ""
        messages.print(
            f"{outcome.made} clips made{there}: {job.storage.uri}", markup=False, highlight=False, soft_wrap=True
        )
    _show_sheet(outcome, config)


def own_shard(config: SampleConfig, environment: Mapping[str, str]) -> tuple[int, int]:
    """(number, shards in all): what the config says, else the pod's place in its Job, else all of it.

    Raises:
        UsageError: the environment makes no sense.
    """
    if config.shard is not None:
        return parse_shard(config.shard)
    count, index = environment.get("OPENSORA_NUM_SHARDS"), environment.get("JOB_COMPLETION_INDEX")
    if count is None:
        return 0, 1
    try:
        return parse_shard(f"{index}/{count}")
    except ConfigError as error:
        raise UsageError(
            f"OPENSORA_NUM_SHARDS={count!r} with JOB_COMPLETION_INDEX={index!r} names no shard",
            hint="an Indexed Job sets the second; or give --shard",
        ) from error


def _show_sheet(outcome: Outcome, config: SampleConfig) -> None:
    """On a terminal with colours; elsewhere its address is enough."""
    from opensora.sheet import TerminalSheet

    if outcome.sheet_uri is None:
        return
    output = Console()
    if output.is_terminal and output.color_system is not None and config.verbose > 0:
        output.print(TerminalSheet(outcome.rows))
    logger.info("contact sheet: %s", outcome.sheet_uri)


def _start_of(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class _ConsoleHandler(logging.Handler):
    """Log lines on a console, above its progress bar. Lines are not broken, so that paths can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _logging_to(console: Console, *, verbose: int) -> Iterator[None]:
    handler = _ConsoleHandler(console)
    package = logging.getLogger("opensora")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO if verbose > 0 else logging.WARNING)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _progress_bar(console: Console, *, shown: bool) -> ProgressBar:
    """A bar that moves with every step; on a terminal only."""
    return ProgressBar(
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clips"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not shown or not console.is_terminal,
        transient=True,
    )


class _Stop:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        if self.requested:
            raise StopRequestedError(
                "stopped by SIGTERM; clips that are written stay", hint="the same command continues"
            )


@contextmanager
def _stop_on_sigterm() -> Iterator[_Stop]:
    stop = _Stop()

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
