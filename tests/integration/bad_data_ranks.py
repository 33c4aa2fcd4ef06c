"""A rank that trains several small runs one after the other: `bad_data_ranks.py CASES FOLDER`.

CASES is a JSON file: name → {"config": settings of the run, "absent": ids of rows}. The clips of `absent` are read like
all others, and cut out of their micro-batches before the trainer sees them: what leaving out a clip is compared with.
How each run ended, and what each rank logged, goes to `FOLDER/NAME.json`. With several ranks, a run may only fail where
all ranks do so together.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora.acceleration.mesh import World, init_world
from opensora.config.load import parse_train_config
from opensora.config.train import TrainConfig
from opensora.datasets.loader import ClipBatch, SkippedClip, StepLoader, StepWork
from opensora.datasets.plan import Cursor
from opensora.errors import OpenSoraError
from opensora.storage import Storage
from opensora.training.control import StopControl
from opensora.training.position import Position
from opensora.training.trainer import Trainer, build_parts
from opensora.training.watchdog import Watchdog


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Without:
    """A loader whose batches lack some clips."""

    def __init__(self, loader: StepLoader, absent: set[int]) -> None:
        self._loader, self._absent = loader, absent

    def steps(self, start: Cursor) -> Iterator[StepWork]:
        for work in self._loader.steps(start):
            yield replace(work, _take=lambda give_up, take=work._take: self._cut(take, give_up))

    def take_skipped(self) -> list[SkippedClip]:
        return []

    def close(self) -> None:
        self._loader.close()

    def _cut(
        self, take: Callable[[Callable[[], bool]], ClipBatch | None], give_up: Callable[[], bool]
    ) -> ClipBatch | None:
        batch = take(give_up)
        assert batch is not None
        kept = [at for at, row in enumerate(batch.ids) if row not in self._absent]
        if not kept:
            return None
        return replace(
            batch,
            rows=[batch.rows[at] for at in kept],
            ids=[batch.ids[at] for at in kept],
            video=batch.video[kept],
            text=[batch.text[at] for at in kept],
            fps=batch.fps[kept],
            height=batch.height[kept],
            width=batch.width[kept],
            num_frames=batch.num_frames[kept],
            ar=batch.ar[kept],
        )


def train(config: TrainConfig, absent: set[int], world: World) -> dict[str, Any]:
    position, lines = Position(world.rank), Lines()
    logger = logging.getLogger("opensora")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    watchdog = Watchdog(config.watchdog, clock=position.clock, on_stall=lambda reason, stacks: None)
    outcome: dict[str, Any] = {"code": 0}
    try:
        trainer = Trainer(
            config, world=world, run=Storage(config.run_uri), attempt=1, control=StopControl(position),
            position=position, watchdog=watchdog, parts=build_parts(config, world.device),
        )  # fmt: skip
        if absent:
            trainer.loader = Without(trainer.loader, absent)  # type: ignore[assignment]  # all that the trainer uses
        trainer.train()
    except OpenSoraError as error:
        record = position.failed(error)
        outcome = {"code": record.code, "record": str(record), "samples": record.samples, "hint": error.hint}
    finally:
        watchdog.stop()
        logger.removeHandler(lines)
    return {**outcome, "log": world.gather(lines.said)}


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    settings = {name: parse_train_config(json.dumps(case["config"]), source=name) for name, case in cases.items()}
    world = init_world(next(iter(settings.values())).parallel, device="cpu")
    for name, case in cases.items():
        outcome = train(settings[name], set(case["absent"]), world)
        if world.is_main:
            (folder / f"{name}.json").write_text(json.dumps(outcome))
    world.close()


if __name__ == "__main__":
    main()
