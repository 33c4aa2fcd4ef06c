"""The training loop: it says when, its parts say how.

A step's loss is the sum of its micro-batches' numerators over the sum of their denominators, both taken over all
ranks. Gradients are summed by the collectives and divided once, so that neither the number of ranks nor a clip that
could not be read changes what a step computes.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from opensora import __version__, records
from opensora.acceleration.activation_checkpoint import checkpoint_blocks
from opensora.acceleration.mesh import World
from opensora.acceleration.sharding import free_gathered_weights, shard_model, sharded_modules
from opensora.checkpoint import CheckpointInfo, CheckpointManager, SaveTicket, export_safetensors
from opensora.config.load import dump_config
from opensora.config.train import DataConfig, TrainConfig
from opensora.datasets.bucket import Bucket
from opensora.datasets.catalogue import Catalogue, load_catalogue
from opensora.datasets.cost import shape_costs
from opensora.datasets.loader import ClipBatch, SkippedClip, StepLoader, StepWork
from opensora.datasets.plan import Cursor, EpochPlan, build_plan
from opensora.datasets.reader import ReadingStoppedError
from opensora.errors import CheckpointError, ConfigError, DivergedError, StopRequestedError
from opensora.registry import MODELS, SCHEDULERS
from opensora.spool import PartSpool
from opensora.storage import Storage
from opensora.training.clock import Phase
from opensora.training.control import StopControl
from opensora.training.ema import EMA
from opensora.training.failures import translated
from opensora.training.metrics import MetricsWriter, peak_memory_gib, peak_tflops
from opensora.training.operator_link import OperatorLink
from opensora.training.optim import ShardedAdamW, learning_rate
from opensora.training.position import Position
from opensora.training.progress import ProgressReporter, ProgressState, State
from opensora.training.state import checkpoint_tensors, exported_tensors, trainable_parameters
from opensora.training.step import DiffusionStep, WeightedLoss, num_tokens
from opensora.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Sampler = Callable[[nn.Module, int, Callable[[], bool]], None]
"""(model, step, whether to stop) → clips in the run directory. Called by all ranks at once."""


@dataclass(frozen=True)
class Parts:
    """The frozen companions of the model."""

    vae: Any
    text_encoder: Any
    scheduler: Any


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float
    grad_norm: float
    lr: float
    num_samples: int
    num_tokens: int


class Trainer:
    """One rank of one attempt of a run."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        run: Storage,
        attempt: int,
        control: StopControl,
        position: Position,
        watchdog: Watchdog,
        parts: Parts,
        sampler: Sampler | None = None,
        operator: OperatorLink | None = None,
    ) -> None:
        self.config, self.world, self.run, self.attempt = config, world, run, attempt
        self.control, self.watchdog = control, watchdog
        self.requests = operator.requests if operator is not None else None
        self.position, self.clock = position, position.clock
        self.sampler = sampler

        self.catalogue = load_data(config.data, config)
        self.plans = PlanCache(config, self.catalogue, config.data)
        self.plans(0)  # says now when there is nothing to train on, before anything is written
        self.micro_batches_per_step = self._join_run()
        self.config = replace(config, train=replace(config.train, micro_batches_per_step=self.micro_batches_per_step))
        if world.is_main:
            run.write(records.CONFIG_PATH, dump_config(self.config).encode())
        self.plans.use(self.micro_batches_per_step)
        self.loader = self._make_loader(self.plans, config.data)
        self.held_out = self._plan_validation() if config.validation.every_steps else None
        self.total_steps = config.train.steps or self.plans(0).num_steps * (config.train.epochs or 0)

        self.model = build_model(config, parts)
        blocks: dict[str, nn.ModuleList] = self.model.blocks  # type: ignore[assignment]  # the seam that models offer
        checkpoint_blocks(blocks, config.parallel.activation_checkpointing)
        self.model.to(world.device)
        shard_model(
            self.model,
            blocks,
            world=world,
            sharding=config.parallel.sharding,
            compute_dtype=COMPUTE_DTYPES[config.dtype],
        )
        parameters = trainable_parameters(self.model)
        self.optimizer = ShardedAdamW(parameters, config.optim)
        self.ema = None if config.optim.ema_decay is None else EMA(parameters, decay=config.optim.ema_decay)
        self.diffusion = DiffusionStep(
            self.model,
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            scheduler=parts.scheduler,
            config=config,
            device=world.device,
        )

        self.step = 0
        self.cursor = Cursor(epoch=0, step=0)
        self.num_skipped = 0
        self.gave_up_waiting = False
        self.skips: PartSpool | None = None
        self.saved_step: int | None = None
        self._ticket: SaveTicket | None = None
        self._committed: int | None = None
        self.checkpoints = CheckpointManager(
            run,
            attempt=attempt,
            config=config.checkpoint,
            is_main=world.is_main,
            process_group=world.saving if world.size > 1 else None,
        )
        self._restore()

        self._durations: deque[float] = deque(maxlen=50)
        self._num_samples: deque[int] = deque(maxlen=50)
        self._seconds_before: dict[Phase, float] = {}
        self._last_loss: float | None = None
        self._state: State = "Starting"
        self._samples_step: int | None = None
        self._num_checkpoints_asked = 0
        """Requests for a checkpoint that are carried out."""
        self.metrics: MetricsWriter | None = None
        self.progress: ProgressReporter | None = None
        if world.is_main:
            self.metrics = MetricsWriter(run, attempt=attempt, config=config.report, run_config=asdict(config))
            self.progress = ProgressReporter(
                run, total_steps=self.total_steps, first_step=self.step, url=config.report.progress_url,
                operator=operator,
            )  # fmt: skip
            self._update_progress(self._state)

    # ------------------------------------------------------------------------------------------------- loop

    def train(self) -> None:
        """Train until the last step.

        Raises:
            StopRequestedError: asked to stop; the state is saved.
            DivergedError, DataError, PeerLostError, …: see `opensora.errors`.
        """
        config = self.config
        self.control.start_loop(deadline_seconds=config.checkpoint.stop_deadline_seconds)
        self.clock.switch("other")
        outcome = "failed"
        try:
            for work in self._steps():
                started = time.monotonic()
                result = self.train_step(work)
                self._step_finished(work, result, seconds=time.monotonic() - started)
                self._save_validate_sample()
            if self.saved_step != self.step:
                self._save()
            with self.clock("saving"):
                self.checkpoints.wait()
            if config.checkpoint.export:
                self.export()
            outcome = "done"
        except StopRequestedError:
            outcome = "stopped"
            raise
        finally:
            self._close(outcome)

    def _steps(self) -> Iterator[StepWork]:
        """The remaining steps; ends at the last one, raises when the ranks agree to stop."""
        if self._finished():
            return
        for work in self.loader.steps(self.cursor):
            yield work
            if self._finished():
                return

    def _finished(self) -> bool:
        if self.config.train.steps is not None:
            return self.step >= self.config.train.steps
        return self.cursor.epoch >= (self.config.train.epochs or 0)

    def _save_validate_sample(self) -> None:
        config, last = self.config, self._finished()
        if config.checkpoint.every_steps and self.step % config.checkpoint.every_steps == 0:
            self._save()
        if config.validation.every_steps and (self.step % config.validation.every_steps == 0 or last):
            with self.clock("validation"), self._showing("Evaluating"):
                self._validate()
        if self.sampler and config.samples.every_steps and (self.step % config.samples.every_steps == 0 or last):
            with self.clock("sampling"), self._showing("Sampling"):
                self._sample()

    # ------------------------------------------------------------------------------------------------- step

    def train_step(self, work: StepWork) -> StepResult:
        """One optimiser step over this rank's share of the step's micro-batches."""
        shards_weights = self.config.parallel.sharding == "zero3"
        # With gathered weights kept (zero-2), ranks may run different numbers of micro-batches: nothing is exchanged
        # before the last. Where each one gathers (zero-3), all run equally many, some with zero weight.
        slots = work.num_slots if shards_weights else max(1, len(work.micro_batches))
        self.position.step = self.step + 1
        self.model.train()
        numerators: list[torch.Tensor] = []
        seen: list[ClipBatch] = []
        denominator, samples, tokens = 0.0, 0, 0
        for slot, batch in enumerate(self._batches(work, slots, self.catalogue)):
            if slot == 0:
                self._agree_to_begin()
            last = slot == slots - 1
            self._synchronise_gradients(shards_weights or last)
            if batch is None:
                with self.clock("forward/backward"), self._translated():
                    backward = self.diffusion.idle_loss().backward
            else:
                with self.clock("encode"), self._translated():
                    example = self.diffusion.prepare(batch)
                with self.clock("forward/backward"), self._translated():
                    loss = self.diffusion.loss(example)
                    backward = loss.numerator.backward
                numerators.append(loss.numerator.detach())
                seen.append(batch)
                denominator += loss.denominator
                samples += len(batch.ids)
                tokens += len(batch.ids) * num_tokens(example.latents, self.config.model.patch_size)
            if last and work.num_slots > 1:
                # The last moment at which all ranks can still leave the step together.
                self._agree_to_go_on(not self.gave_up_waiting)
            with self.clock("forward/backward"), self._translated():
                backward()  # type: ignore[no-untyped-call]
        self.position.set_clips(None)
        with self.clock("forward/backward"):
            numerator = float(torch.stack(numerators).double().sum()) if numerators else 0.0
            squares = self.optimizer.squared_gradient_norm() / self.world.replicas
        skipped = self.loader.take_skipped()
        with self.clock("imbalance"), self._translated():
            sums = self.world.sum([numerator, denominator, squares, samples, tokens, len(skipped)])
        if sums.pop() > 0:
            self.num_skipped += self._tell_skipped(self.loader, skipped, epoch=work.epoch)
        return self._update(sums, numerators, seen)

    def _tell_skipped(self, loader: StepLoader, mine: list[SkippedClip], **where: Any) -> int:
        """Record the clips that the ranks have left out, and count them towards the limit; returns their number."""
        skipped = [clip for clips in self.world.gather(mine) for clip in clips]
        if skipped and self.world.is_main:
            if self.skips is None:
                prefix = records.skipped_prefix(self.attempt)
                seconds = self.config.report.flush_seconds
                self.skips = PartSpool(self.run, prefix, suffix=".jsonl", flush_seconds=seconds)
            for clip in skipped:
                self.skips.write(json.dumps({"step": self.position.step, **where, **asdict(clip)}) + "\n")
        loader.count_bad(skipped)
        return len(skipped)

    def _update(self, sums: list[float], numerators: list[torch.Tensor], seen: list[ClipBatch]) -> StepResult:
        numerator, denominator, squares, samples, tokens = sums
        lr = learning_rate(self.step, self.config.optim, total_steps=self.config.train.steps)
        with self.clock("optimiser"):
            if denominator == 0:
                logger.warning("step %d: every clip was left out; the weights stay as they are", self.step + 1)
                self.optimizer.zero_grad()
                return StepResult(math.nan, 0.0, lr, 0, 0)
            loss, norm = numerator / denominator, math.sqrt(squares) / denominator
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._report_divergence(loss, norm, numerators, seen)
            clip = self.config.optim.grad_clip
            scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            self.optimizer.step(lr=lr, scale=scale / denominator)
            if self.ema is not None:
                self.ema.update()
        return StepResult(loss, norm, lr, int(samples), int(tokens))

    def _batches(self, work: StepWork, slots: int, catalogue: Catalogue) -> Iterator[ClipBatch | None]:
        """One batch for each slot; None where there is none, and once a stop was asked for while one was waited for."""
        batches = work.batches(give_up=lambda: self.control.requested)
        for slot in range(slots):
            batch = None
            if slot < len(work.micro_batches):
                planned = work.micro_batches[slot]
                self.position.set_clips(planned.shape.name, [catalogue.row_path(int(row)) for row in planned.rows])
                with self.clock("data wait"):
                    try:
                        batch = next(batches, None)
                    except ReadingStoppedError:
                        self.gave_up_waiting = True
            yield batch

    def _synchronise_gradients(self, wanted: bool) -> None:
        for module in sharded_modules(self.model):
            module.set_requires_gradient_sync(wanted, recurse=False)
            module.set_reshard_after_backward(wanted, recurse=False)

    def _agree_to_begin(self) -> None:
        """Begin the step, unless one of the ranks was asked to stop; before it, save if rank 0 was asked to.

        Both travel in one collective. The state is that of the last step: nothing of this one is computed yet.
        """
        asked = self.requests.num_checkpoints if self.requests is not None else 0
        with self.clock("imbalance"), self._translated():
            stop, asked = self.world.max([self.control.requested, asked])
        if asked > self._num_checkpoints_asked and self.step > 0:
            self._num_checkpoints_asked = asked
            if self.saved_step != self.step:
                self._save()
            if self.requests is not None:
                ticket = self._ticket
                self.requests.saving(asked, step=self.step, is_committed=lambda: ticket is None or ticket.committed)
        if stop:
            self._stop()

    def _agree_to_go_on(self, willing: bool) -> None:
        """Go on with the step only if all ranks are willing; else stop, all of them, with the last step's state."""
        with self.clock("imbalance"), self._translated():
            stop = self.world.any(not willing)
        if stop:
            self._stop()

    def _stop(self) -> None:
        self.position.step = self.step
        self.position.set_clips(None)
        free_gathered_weights(self.model)
        self._update_progress("Stopping")
        if self.saved_step != self.step and self.step > 0:
            self._save()
        with self.clock("saving"):
            self.checkpoints.wait()
        raise StopRequestedError(f"stopped after step {self.step}; the same command continues from there")

    def _report_divergence(
        self, loss: float, norm: float, numerators: list[torch.Tensor], seen: list[ClipBatch]
    ) -> None:
        """Name the step, the bucket and the clips; the weights keep the last good step."""
        mine = [
            f"rank {self.world.rank}, bucket {batch.shape.name}, rows {batch.ids}"
            for value, batch in zip(numerators, seen, strict=True)
            if not math.isfinite(float(value))
        ]
        culprits = [text for texts in self.world.gather(mine) for text in texts]
        where = "; ".join(culprits) or "the loss is finite on every rank, the gradient is not"
        raise DivergedError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}: {where}",
            hint="look at these clips, lower optim.lr, or set optim.grad_clip; the last checkpoint is untouched",
        )

    def _translated(self) -> Any:
        bucket = self.position.bucket
        return translated(f" at step {self.step + 1}" + (f", bucket {bucket}" if bucket else ""))

    # --------------------------------------------------------------------------------------------- reporting

    def _step_finished(self, work: StepWork, result: StepResult, *, seconds: float) -> None:
        self.step += 1
        self.cursor = self.plans.after(Cursor(epoch=work.epoch, step=work.step))
        self.watchdog.step_done()
        self._durations.append(seconds)
        self._num_samples.append(result.num_samples)
        self._last_loss = result.loss
        if self.metrics is None:
            return
        parts = self.clock.seconds()
        before, self._seconds_before = self._seconds_before, parts
        passed = {phase: value - before.get(phase, 0.0) for phase, value in parts.items()}
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "epoch": float(work.epoch),
            "step_seconds": seconds,
            "samples_per_second": result.num_samples / seconds,
            "tokens_per_second": result.num_tokens / seconds,
            "data_wait_share": passed.get("data wait", 0.0) / seconds,
            "imbalance_share": passed.get("imbalance", 0.0) / seconds,
            "skipped_clips": float(self.num_skipped),
            "goodput": self.clock.goodput(),
            "memory_gib": peak_memory_gib(self.world.device),
            **self._compute_rates(work, seconds),
            **{f"seconds/{phase}": value for phase, value in parts.items()},
        }
        logs = self.step % self.config.train.log_every == 0 or self._finished()
        self.metrics.write(self.step, values, everywhere=logs)
        self._update_progress("Training")
        if logs and not (self.progress and self.progress.has_bar):
            logger.info(
                "step %d/%s  loss %.4f  grad norm %.3g  lr %.3g  %.3g s/step",
                self.step, self.total_steps, result.loss, result.grad_norm, result.lr, statistics.mean(self._durations),
            )  # fmt: skip

    def _compute_rates(self, work: StepWork, seconds: float) -> dict[str, float]:
        tflops = sum(batch.cost for batch in self.plans(work.epoch).step(work.step)) / seconds / 1e12
        peak = peak_tflops(self.world.device)
        return {"tflops": tflops} | ({"mfu": tflops / (peak * self.world.size)} if peak else {})

    @contextmanager
    def _showing(self, state: State) -> Iterator[None]:
        """Say for the length of a block what is done in it."""
        outer = self._state
        self._update_progress(state)
        yield
        self._update_progress(outer)

    def _update_progress(self, state: State) -> None:
        self._state = state
        if self.progress is not None:
            self.progress.update(self._progress_state("training", state))

    def _progress_state(self, phase: str, state: State) -> ProgressState:
        pace = statistics.mean(self._durations) if self._durations else None
        return ProgressState(
            phase=phase,
            state=state,
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.cursor.epoch,
            loss=self._last_loss if self._last_loss is not None and math.isfinite(self._last_loss) else None,
            seconds_per_step=pace,
            samples_per_second=sum(self._num_samples) / sum(self._durations) if self._durations else None,
            eta_seconds=None if pace is None else pace * (self.total_steps - self.step),
            goodput=self.clock.goodput(),
            attempt=self.attempt,
            checkpoint_step=self._committed_step(),
            samples_step=self._samples_step,
            updated=time.time(),
        )

    def _committed_step(self) -> int | None:
        if self._ticket is not None and self._ticket.committed:
            self._committed = self._ticket.step
        return self._committed

    def _close(self, outcome: str) -> None:
        self.watchdog.stop()
        self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.skips is not None:
            self.skips.close()
        if self.progress is not None:
            self.progress.close(self._progress_state(outcome, "Stopping"))

    # --------------------------------------------------------------------------- saving, validating, sampling

    def _save(self) -> None:
        metadata = {
            "step": self.step,
            "cursor": asdict(self.cursor),
            "updates": self.optimizer.num_updates,
            "micro_batches_per_step": self.micro_batches_per_step,
        }
        with self.clock("saving"), self._showing("Saving"), self._translated():
            self._ticket = self.checkpoints.save(
                dict(checkpoint_tensors(self.model, self.optimizer, self.ema)), step=self.step, metadata=metadata
            )
        self.saved_step = self.step
        self.watchdog.beat()

    def _restore(self) -> None:
        """Continue from the newest complete checkpoint of the run, else from `checkpoint.load`."""
        info: CheckpointInfo | None = self.world.broadcast(self.checkpoints.newest() if self.world.is_main else None)
        state = dict(checkpoint_tensors(self.model, self.optimizer, self.ema))
        if info is not None:
            metadata = self.checkpoints.load(info, state)
            self.step = self.saved_step = self._committed = int(metadata["step"])
            self.cursor = Cursor(**metadata["cursor"])
            self.optimizer.num_updates = int(metadata["updates"])
            if self.world.is_main:
                logger.info("attempt %d continues from the checkpoint of step %d", self.attempt, self.step)
        elif self.config.checkpoint.load is not None:
            self._start_from(self.config.checkpoint.load, state)

    def _start_from(self, uri: str, state: dict[str, Any]) -> None:
        """Take the weights, and unless told otherwise the optimiser, of another run."""
        other = CheckpointManager(
            Storage(uri, config=self.config.storage),
            attempt=0,
            config=self.config.checkpoint,
            is_main=self.world.is_main,
            process_group=self.world.saving if self.world.size > 1 else None,
        )
        info: CheckpointInfo | None = self.world.broadcast(other.newest() if self.world.is_main else None)
        if info is None:
            raise CheckpointError(
                f"checkpoint.load={uri!r}: there is no complete checkpoint",
                hint="name the run directory that holds `checkpoints/`",
            )
        if self.config.checkpoint.load_weights_only:
            state = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
            other.load(info, state, partial=True)
            if self.ema is not None:
                self.ema.restart()
        else:
            metadata = other.load(info, state)
            self.optimizer.num_updates = int(metadata["updates"])
        if self.world.is_main:
            logger.info("starting from the checkpoint of step %d of %s", info.step, uri)

    def export(self) -> None:
        """Write the final weights with the published keys."""
        with self.clock("saving"):
            tensors = {}
            for name, tensor in exported_tensors(self.model, self.ema).items():
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                if self.world.is_main:
                    tensors[name] = whole.detach().cpu()
            if self.world.is_main:
                target = self.run.child(records.EXPORT_PREFIX)
                export_safetensors(tensors, target, "model.safetensors", metadata={"step": str(self.step)})
                target.write("config.yaml", dump_config(self.config).encode())
            self.world.barrier()

    def _validate(self) -> None:
        """The loss of the held-out clips at evenly spaced times, the same on any number of ranks."""
        assert self.held_out is not None, "called only with a catalogue"
        plans = self.held_out
        loader = self._make_loader(plans, plans.data)
        max_batches = self.config.validation.max_batches
        num_steps = min(plans(0).num_steps, -(-max_batches // self.micro_batches_per_step))
        numerator = denominator = 0.0
        try:
            self.model.eval()
            for work in loader.steps(Cursor(epoch=0, step=0)):
                if work.epoch > 0 or work.step >= num_steps:
                    break
                for part in self._validation_losses(work, plans.catalogue):
                    numerator += float(part.numerator)
                    denominator += part.denominator
                self.watchdog.beat()
                if self.world.any(self.control.requested):
                    return
        finally:
            loader.close()
            free_gathered_weights(self.model)
        with self._translated():
            self._tell_skipped(loader, loader.take_skipped(), held_out=True)
            total, count = self.world.sum([numerator, denominator])
        loss = total / count if count else math.nan
        if self.metrics is not None:
            self.metrics.write(self.step, {"validation_loss": loss}, everywhere=True)
            logger.info("step %d  validation loss %.4f", self.step, loss)

    @torch.no_grad()
    def _validation_losses(self, work: StepWork, catalogue: Catalogue) -> Iterator[WeightedLoss]:
        times = (np.arange(self.config.validation.num_timesteps) + 0.5) / self.config.validation.num_timesteps
        total = self.config.scheduler.num_timesteps
        for batch in self._batches(work, work.num_slots, catalogue):
            example = None if batch is None else self.diffusion.prepare_validation(batch)
            for time_ in times:
                if example is None:
                    self.diffusion.idle_loss()
                else:
                    timesteps = torch.full((len(example.latents),), float(time_ * total), device=self.world.device)
                    yield self.diffusion.loss(example, timesteps=timesteps)

    def _sample(self) -> None:
        """Sample with the averaged weights, if they are kept."""
        assert self.sampler is not None, "called only with a sampler"
        self.model.eval()
        stopped = False

        def should_stop() -> bool:
            nonlocal stopped
            self.watchdog.beat()
            stopped = self.world.any(self.control.requested)
            return stopped

        try:
            if self.ema is None:
                self.sampler(self.model, self.step, should_stop)
            else:
                with self.ema.in_place_of_weights():
                    self.sampler(self.model, self.step, should_stop)
                    free_gathered_weights(self.model)
        finally:
            free_gathered_weights(self.model)
        if not stopped:
            self._samples_step = self.step

    # ------------------------------------------------------------------------------------------ construction

    def _make_loader(self, plans: PlanCache, data: DataConfig) -> StepLoader:
        return StepLoader(
            plans.catalogue,
            plans,
            data=data,
            seed=self.config.seed,
            rank=self.world.rank,
            num_ranks=self.world.size,
            storage=self.config.storage,
        )

    def _plan_validation(self) -> PlanCache:
        """The held-out clips, in the order of their catalogue."""
        config = self.config
        assert config.validation.path is not None, "the config refuses validation without a catalogue"
        data = replace(
            config.data,
            path=config.validation.path,
            root=None,
            repeats=1,
            bucket_config=config.validation.bucket_config or config.data.bucket_config,
            shuffle=False,
            drop_last=False,
        )
        plans = PlanCache(config, load_data(data, config), data)
        plans.use(self.micro_batches_per_step)
        return plans

    def _join_run(self) -> int:
        """Write `run.json` at the first attempt, compare with it later. Returns the micro-batches per step."""
        if self.world.is_main:
            count = self.config.train.micro_batches_per_step or self.world.size * self.config.train.accumulation
            data = self.config.data
            facts = {
                "seed": self.config.seed,
                "train.balance_window": self.config.train.balance_window,
                "data.repeats": data.repeats,
                "data.frame_interval": data.frame_interval,
                "data.shuffle": data.shuffle,
                "data.drop_last": data.drop_last,
                "data.bucket_config": json.dumps(data.bucket_config, sort_keys=True),
                "catalogue": self.catalogue.digest,
            }
            mine = {
                **facts,
                "micro_batches_per_step": count,
                "created": time.time(),
                "versions": {
                    "opensora": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
            }
            if not self.run.create(records.RUN_PATH, json.dumps(mine, indent=1).encode()):
                known = json.loads(self.run.read(records.RUN_PATH))
                self._compare_with_run(facts, known)
                count = int(known["micro_batches_per_step"])
            return self.world.broadcast(count)
        return self.world.broadcast(0)

    def _compare_with_run(self, facts: dict[str, Any], known: dict[str, Any]) -> None:
        for name, value in facts.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{self.run.uri} was begun with another {name} ({known.get(name)!r}, now {value!r}): its order of "
                    "samples cannot be continued",
                    hint="choose a new run_uri, and set checkpoint.load to this one to keep its weights",
                )
        wanted = self.config.train.micro_batches_per_step
        if wanted is not None and wanted != known["micro_batches_per_step"]:
            raise ConfigError(
                f"train.micro_batches_per_step={wanted}, but this run was begun with {known['micro_batches_per_step']}",
                hint="remove the setting, or choose a new run_uri",
            )


class PlanCache:
    """Epoch → plan, made when first asked for; the newest two are kept."""

    def __init__(self, config: TrainConfig, catalogue: Catalogue, data: DataConfig) -> None:
        self.catalogue = catalogue
        self.data = data
        self._micro_batches_per_step = 1
        self._config = config
        self._bucket = Bucket(data.bucket_config)
        self._costs = shape_costs(self._bucket.entries, config.model, text_tokens=config.text_encoder.model_max_length)
        self._plans: dict[int, EpochPlan] = {}

    def use(self, micro_batches_per_step: int) -> None:
        """Make plans with this many micro-batches per step from now on."""
        self._micro_batches_per_step = micro_batches_per_step
        self._plans.clear()

    def __call__(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = build_plan(
                self.catalogue,
                self._bucket,
                seed=self._config.seed,
                epoch=epoch,
                micro_batches_per_step=self._micro_batches_per_step,
                costs=self._costs,
                balance_window=self._config.train.balance_window,
                drop_last=self.data.drop_last,
                shuffle=self.data.shuffle,
                frame_interval=self.data.frame_interval,
            )
        return self._plans[epoch]

    def after(self, cursor: Cursor) -> Cursor:
        """The step that follows."""
        if cursor.step + 1 < self(cursor.epoch).num_steps:
            return Cursor(epoch=cursor.epoch, step=cursor.step + 1)
        return Cursor(epoch=cursor.epoch + 1, step=0)


def load_data(data: DataConfig, config: TrainConfig) -> Catalogue:
    """Read and check a catalogue; what is dropped is said."""
    return load_catalogue(data.path, root=data.root, repeats=data.repeats, config=config.storage)


def build_parts(config: TrainConfig, device: torch.device) -> Parts:
    """The VAE, the text encoder and the scheduler of a run."""
    vae = MODELS.build(asdict(config.vae))
    text_encoder = MODELS.build(asdict(config.text_encoder))
    scheduler = SCHEDULERS.build(asdict(config.scheduler))
    return Parts(vae=vae.to(device).eval(), text_encoder=text_encoder, scheduler=scheduler)


def build_model(config: TrainConfig, parts: Parts) -> nn.Module:
    """The diffusion model in its master type, with the same first weights on every rank."""
    sizes = {
        "in_channels": config.vae.channels,
        "caption_channels": parts.text_encoder.output_dim,
        "model_max_length": parts.text_encoder.model_max_length,
    }
    settings = asdict(config.model)
    for name, size in sizes.items():
        if settings[name] not in (None, size):
            raise ConfigError(
                f"model.{name}={settings[name]}, but the VAE or text encoder gives {size}", hint=f"remove model.{name}"
            )
    torch.manual_seed(config.seed)
    model: nn.Module = MODELS.build({**settings, **sizes})
    return model.to(torch.float64 if config.dtype == "fp64" else torch.float32)
