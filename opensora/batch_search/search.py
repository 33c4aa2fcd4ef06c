"""The loop over the buckets: measure, decide, keep what is known."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from opensora.batch_search.choice import Limits, NothingFits, choose, common_step_seconds
from opensora.batch_search.fresh_process import Failure, Outcome, OutOfMemory
from opensora.batch_search.probe import ProbeResult
from opensora.batch_search.report import parse_known
from opensora.config.search import SearchConfig
from opensora.config.train import TrainConfig
from opensora.datasets.batch_table import (
    BatchTable,
    BucketFailure,
    BucketResult,
    Evidence,
    Facts,
    Point,
    bucket_names,
    facts_of,
    read_batch_table,
    write_batch_table,
)
from opensora.errors import ConfigError, ExitCode, OpenSoraError, OutOfMemoryError, UsageError

logger = logging.getLogger(__name__)

Measure = Callable[[str, int], Outcome]
"""(bucket, batch size) → what came of it; a batch size of 0 is the empty batch."""
Tell = Callable[[str, int, BatchTable | None], None]
"""(bucket, batch size, what is known) before a measurement; nothing is known before the empty batch is measured."""


class MeasurementFailedError(OpenSoraError):
    """The empty batch could not be measured, so that nothing can."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"the empty batch cannot be measured: {failure.message}")
        self.exit_code = ExitCode(failure.code)


class BatchSearch:
    """Finds a batch size for every bucket of a training."""

    def __init__(self, config: TrainConfig, settings: SearchConfig, *, measure: Measure, tell: Tell) -> None:
        """Check what can be checked before anything is measured.

        Args:
            config: the training.
            settings: what is searched.
            measure: takes a measurement.
            tell: called before each one.

        Raises:
            UsageError: there is no such bucket, or `known` is not understood.
            ConfigError: the run is on a CPU, and there is no budget.
        """
        self._config = config
        self._settings = settings
        self._measure = measure
        self._tell = tell
        names = bucket_names(config.data.bucket_config)
        unknown = [name for name in settings.bucket or () if name not in names]
        if unknown:
            raise UsageError(
                f"data.bucket_config has no bucket {unknown[0]!r} that takes clips",
                hint=f"there are: {', '.join(names)}",
            )
        self.buckets = list(dict.fromkeys(settings.bucket or names))
        self._known = parse_known(settings.known or ())
        if config.device == "cpu":
            self._memory_bytes(None)

    def run(self) -> BatchTable:
        """Search every bucket; what is known already is not measured again.

        Returns:
            The table. It is also in `output`, as it was after every measurement.

        Raises:
            OutOfMemoryError: the model does not fit, even without a clip.
            MeasurementFailedError: it does not run.
            ConfigError: `output` holds the table of another search.
            StopRequestedError: asked to stop.
        """
        settings = self._settings
        empty = self._measure_empty()
        memory_bytes = self._memory_bytes(empty.device_bytes)
        self._empty_bytes = 0 if empty.device_bytes is not None else empty.peak_bytes
        self._table = self._open_table(empty, memory_bytes)
        limits = Limits(memory_bytes * (1 - settings.headroom_percent / 100))
        if settings.objective == "EqualStepTime":
            seconds = settings.step_seconds or self._common_seconds(limits)
            self._table = replace(self._table, step_seconds=None if seconds == math.inf else seconds)
            limits = replace(limits, step_seconds=seconds)
        for name in self.buckets:
            self._keep(name, self._settle(name, limits))
        return self._table

    def _measure_empty(self) -> ProbeResult:
        self._tell(self.buckets[0], 0, None)
        outcome = self._measure(self.buckets[0], 0)
        if isinstance(outcome, OutOfMemory):
            raise OutOfMemoryError(
                f"the model does not fit, even without a clip: {outcome.message}",
                hint="shard it over more ranks (--nproc-per-node), or set parallel.sharding=zero3",
            )
        if isinstance(outcome, Failure):
            raise MeasurementFailedError(outcome)
        return outcome

    def _memory_bytes(self, device_bytes: int | None) -> int:
        memory = self._settings.budget_bytes or device_bytes
        if memory is None:
            raise ConfigError(
                "memory_budget is not set: on a CPU nothing says how much memory a batch may take",
                hint="for example --memory-budget 2GiB",
            )
        return memory

    def _open_table(self, empty: ProbeResult, memory_bytes: int) -> BatchTable:
        """The table that was begun earlier, or a new one."""
        settings = self._settings
        facts: Facts = {
            **facts_of(self._config, ranks=empty.ranks, accelerator=empty.accelerator),
            "memory_bytes": memory_bytes,
            **empty.versions,
        }
        table = read_batch_table(settings.output, storage=self._config.storage)
        if table is None:
            table = BatchTable(facts=facts, headroom_percent=settings.headroom_percent, objective=settings.objective)
        elif table.facts != facts:
            names = [name for name in {**facts, **table.facts} if facts.get(name) != table.facts.get(name)]
            raise ConfigError(
                f"output={settings.output!r} holds a table for another {', '.join(names)}",
                hint="choose another --output: what was measured there does not hold here",
            )
        return replace(
            table,
            headroom_percent=settings.headroom_percent,
            objective=settings.objective,
            step_seconds=None,
            empty_bytes=self._empty_bytes,
        )

    def _common_seconds(self, limits: Limits) -> float:
        """How long the steps of the buckets can be alike. What is found on the way is evidence, no result yet."""
        results: dict[str, BucketResult] = {}
        for name in self.buckets:
            found = self._settle(name, limits)
            if isinstance(found, BucketResult):
                results[name] = found
        if not results:
            return math.inf
        seconds = common_step_seconds(results)
        logger.info("a step may take %.3g s", seconds)
        return seconds

    def _settle(self, name: str, limits: Limits) -> BucketResult | BucketFailure:
        """Measure until a bucket has a batch size, or a reason why it has none."""
        evidence = self._table.evidence(name)
        if evidence == Evidence():
            evidence = self._known
        while True:
            choice = choose(evidence, limits, max_batch=self._settings.max_batch)
            if isinstance(choice, BucketResult):
                return choice
            if isinstance(choice, NothingFits):
                return BucketFailure(reason=choice.reason, code=ExitCode.OUT_OF_MEMORY, evidence=evidence)
            self._keep(name, evidence)
            outcome = self._try(name, choice.batch_size)
            if isinstance(outcome, Failure):
                return BucketFailure(reason=outcome.message, code=outcome.code, evidence=evidence)
            evidence = self._learn(evidence, choice.batch_size, outcome)
            self._keep(name, evidence)

    def _try(self, name: str, batch_size: int) -> Outcome:
        self._tell(name, batch_size, self._table)
        outcome = self._measure(name, batch_size)
        if isinstance(outcome, ProbeResult):
            taken = self._taken_bytes(outcome) / 2**30
            logger.info("%s: batch %d: %.3g GiB, %.3g s", name, batch_size, taken, outcome.seconds_per_step)
        else:
            why = "does not fit" if isinstance(outcome, OutOfMemory) else "failed"
            logger.info("%s: batch %d: %s: %s", name, batch_size, why, outcome.message.partition("\n")[0])
        return outcome

    def _learn(self, evidence: Evidence, batch_size: int, outcome: ProbeResult | OutOfMemory) -> Evidence:
        if isinstance(outcome, OutOfMemory):
            return replace(evidence, too_large=(*evidence.too_large, batch_size))
        point = Point(batch_size, self._taken_bytes(outcome), outcome.seconds_per_step)
        return replace(evidence, points=(*evidence.points, point))

    def _taken_bytes(self, outcome: ProbeResult) -> int:
        return max(0, outcome.peak_bytes - self._empty_bytes)

    def _keep(self, name: str, found: BucketResult | BucketFailure | Evidence) -> None:
        table = self._table.with_bucket(name, found)
        if table != self._table:
            self._table = table
            write_batch_table(self._settings.output, table, storage=self._config.storage)
