"""What a run can do besides its steps: validate, sample, accumulate, start from another run, keep some checkpoints.

Runs on one rank train in this process, which saves a start; runs on several go through the launcher.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from training_here import config_of, train_here
from training_runs import CONFIG, Run

from opensora.checkpoint.manifest import scan_checkpoints
from opensora.checkpoint.transfer import CheckpointReader, ValueLoadPlanner, load_alone
from opensora.config.load import load_train_config
from opensora.errors import CheckpointError
from opensora.storage import Storage
from opensora.training.trainer import build_model, build_parts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 6
"""Two epochs of three steps."""
SHORT = (f"train.steps={STEPS}", "checkpoint.every_steps=0")


def records_of(run: Run) -> list[dict[str, Any]]:
    parts = sorted(run.folder.glob("metrics/attempt-*/part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def validation_losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in records_of(run) if "validation_loss" in line}


def kept_steps(run: Run) -> list[int]:
    return sorted(int(path.parents[1].name[5:]) for path in run.folder.glob("checkpoints/*/*/manifest.json"))


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    storage = Storage(str(run.folder))
    info = scan_checkpoints(storage).complete[-1]
    reader = CheckpointReader(storage.child(info.path), info.manifest)
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_alone(state, reader, ValueLoadPlanner())
    return state


def assert_same_training(run: Run, expected: Run, *, tolerance: float = 0.0, weights: bool = True) -> None:
    """The same losses and, where asked for, weights: bit for bit, or within a relative tolerance."""
    wanted, got = expected.losses(), run.losses()
    assert sorted(got) == sorted(wanted)
    assert [got[step] for step in wanted] == pytest.approx(list(wanted.values()), rel=tolerance, abs=0)
    theirs = expected.weights() if weights else {}
    for name, tensor in (run.weights() if weights else {}).items():
        difference = float((tensor - theirs[name]).norm())
        assert difference <= tolerance * float(theirs[name].norm()), f"{name} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def plain(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps on one rank, and nothing else."""
    run = Run(tmp_path_factory.mktemp("plain") / "run", catalogue)
    train_here(config_of(run, *SHORT))
    return run


# -------------------------------------------------------------------------- validation, samples, what is kept


@pytest.fixture(scope="module")
def busy_settings(catalogue: Path) -> tuple[str, ...]:
    return (
        f"train.steps={STEPS}", "validation.every_steps=4", f"validation.path={catalogue}",
        "validation.num_timesteps=3", "samples.every_steps=4", 'samples.prompts=["a cat","a dog runs","a bird"]',
        "samples.num_frames=5", "samples.image_size=[16,24]", "samples.num_sampling_steps=2",
        "checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def busy(catalogue: Path, busy_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same six steps with everything else between them."""
    run = Run(tmp_path_factory.mktemp("busy") / "run", catalogue)
    train_here(config_of(run, *busy_settings))
    return run


@pytest.fixture(scope="module")
def busy_on_two(catalogue: Path, busy_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two ranks, each of which accumulates four micro-batches."""
    run = Run(tmp_path_factory.mktemp("busy-two") / "run", catalogue)
    run.train(2, *busy_settings, "train.micro_batches_per_step=null", "train.accumulation=4")
    return run


def test_validation_samples_and_checkpoints_leave_the_training_as_it_is(busy: Run, plain: Run) -> None:
    assert_same_training(busy, plain)


def test_validation_runs_every_n_steps_and_at_the_end(busy: Run) -> None:
    losses = validation_losses(busy)
    assert list(losses) == [4, 6]
    assert losses[4] != losses[6]


def test_validation_loss_is_the_same_on_any_number_of_ranks(
    busy: Run, busy_on_two: Run, plain: Run, catalogue: Path, tmp_path: Path, busy_settings: tuple[str, ...]
) -> None:
    three = Run(tmp_path / "run", catalogue)
    three.train(
        3, *busy_settings, "samples.every_steps=0", "parallel.sharding=zero3", "checkpoint.export=false",
        "checkpoint.every_steps=0",
    )  # fmt: skip
    for run in (busy_on_two, three):
        assert validation_losses(run) == pytest.approx(validation_losses(busy), rel=1e-10)
        assert_same_training(run, plain, tolerance=1e-10, weights=False)
    assert not (three.folder / "export").exists(), "checkpoint.export=false"
    assert kept_steps(three) == [STEPS]


@pytest.mark.parametrize("name", ["busy", "busy_on_two"])
def test_a_round_of_samples_is_a_clip_per_prompt_and_a_sheet(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    found = {path.relative_to(run.folder / "samples").as_posix() for path in run.folder.glob("samples/*/*")}
    names = ("00.mp4", "01.mp4", "02.mp4", "sheet.png")
    assert found == {f"step-0000000{step}/{name}" for step in (4, 6) for name in names}


@pytest.mark.parametrize("name", ["busy", "busy_on_two"])
def test_the_newest_checkpoints_and_every_nth_are_kept(name: str, request: pytest.FixtureRequest) -> None:
    assert kept_steps(request.getfixturevalue(name)) == [3, 5, 6]


def test_accumulation_is_micro_batches_per_rank(busy_on_two: Run, plain: Run) -> None:
    assert CONFIG["train"]["micro_batches_per_step"] == 2 * 4  # type: ignore[index]  # a dictionary of dictionaries
    assert json.loads((busy_on_two.folder / "run.json").read_text())["micro_batches_per_step"] == 2 * 4
    assert_same_training(busy_on_two, plain, tolerance=1e-10)


def test_every_line_of_metrics_accounts_for_the_time(plain: Run) -> None:
    lines = [line for line in records_of(plain) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for before, after in itertools.pairwise(lines):
        sums = [sum(value for name, value in line.items() if name.startswith("seconds/")) for line in (before, after)]
        assert sums[1] - sums[0] == pytest.approx(after["time"] - before["time"], abs=0.05)
        assert after["step_seconds"] <= sums[1] - sums[0] + 1e-3
        assert 0 < after["goodput"] < 1
        assert after["samples_per_second"] * after["step_seconds"] == pytest.approx(16)  # eight batches of two


# ------------------------------------------------------------------------------------- config.yaml repeats a run


def test_the_resolved_config_repeats_the_run(plain: Run, tmp_path: Path) -> None:
    again = Run(tmp_path / "run", plain.catalogue)
    train_here(load_train_config(str(plain.folder / "config.yaml"), [f"run_uri={again.folder}"]))
    assert_same_training(again, plain)


def test_the_resolved_config_repeats_a_run_of_two_ranks_on_one(busy_on_two: Run, plain: Run, tmp_path: Path) -> None:
    again = Run(tmp_path / "run", plain.catalogue)
    overrides = [f"run_uri={again.folder}", "validation.every_steps=0", "samples.every_steps=0", *SHORT]
    train_here(load_train_config(str(busy_on_two.folder / "config.yaml"), overrides))
    assert_same_training(again, plain, tolerance=1e-10)


def test_a_resumed_optimiser_does_not_count_steps_of_which_nothing_was_left(catalogue: Path, tmp_path: Path) -> None:
    copies = shutil.copytree(catalogue.parent, tmp_path / "clips")
    for number in range(1, 12, 2):  # all clips of one of the two shapes
        (copies / f"{number}.mp4").write_bytes(b"")
    settings = ("data.bad_clip=skip", "train.micro_batches_per_step=1", "checkpoint.every_steps=0")
    whole, resumed = (Run(tmp_path / name, copies / catalogue.name) for name in ("whole", "resumed"))
    train_here(config_of(whole, *settings, "train.steps=8"))
    train_here(config_of(resumed, *settings, "train.steps=5"))
    train_here(config_of(resumed, *settings, "train.steps=8"))
    losses = whole.losses()
    assert None in [losses[step] for step in range(1, 6)]
    assert resumed.losses() == losses
    assert len({loss for step, loss in losses.items() if step > 5} - {None}) > 1


# -------------------------------------------------------------------------------------------- checkpoint.load


LATER = ("seed=8", "train.micro_batches_per_step=2", "train.steps=1", "checkpoint.every_steps=0")
"""Another run: its clips come in another order."""


@pytest.fixture(scope="module")
def loaded(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A step or two from the weights of `plain`, which come in three ways."""
    folder = tmp_path_factory.mktemp("loaded")
    weights = {name[len("model.") :]: value for name, value in state_of(plain).items() if name.startswith("model.")}
    save_file(weights, folder / "plain.safetensors")
    settings = {
        "pretrained": (f"model.from_pretrained={folder / 'plain.safetensors'}",),
        "weights": (f"checkpoint.load={plain.folder}", "checkpoint.load_weights_only=true"),
        "weights, two steps": (f"checkpoint.load={plain.folder}", "checkpoint.load_weights_only=true", "train.steps=2"),
        "everything": (f"checkpoint.load={plain.folder}",),
    }
    runs = {name: Run(folder / name, plain.catalogue) for name in settings}
    for name, run in runs.items():
        train_here(config_of(run, *LATER, *settings[name]))
    return runs


def test_a_run_that_loads_begins_at_step_one_with_the_weights_of_the_other(loaded: dict[str, Run], plain: Run) -> None:
    first = loaded["weights"].losses()
    assert loaded["everything"].losses() == first
    # `from_pretrained` takes the weights in fp32, the type of published ones.
    assert first == pytest.approx(loaded["pretrained"].losses(), rel=1e-6)
    assert first[1] != plain.losses()[1]


def test_loading_weights_only_begins_with_a_new_optimiser_and_new_averages(loaded: dict[str, Run], plain: Run) -> None:
    before, after = state_of(plain), state_of(loaded["weights"])
    for name in (name[len("ema.") :] for name in after if name.startswith("ema.")):
        # Moments of the first step: shares of the gradient, and of its square.
        gradient = after[f"optim.exp_avg.{name}"] / (1 - 0.9)
        square = gradient**2 * (1 - 0.999)
        torch.testing.assert_close(after[f"optim.exp_avg_sq.{name}"], square, rtol=1e-9, atol=1e-30)
        average = 0.9 * before[f"model.{name}"] + 0.1 * after[f"model.{name}"]
        torch.testing.assert_close(after[f"ema.{name}"], average, rtol=1e-12, atol=1e-15)


def test_loading_everything_continues_moments_step_count_and_averages(loaded: dict[str, Run], plain: Run) -> None:
    before, fresh, after = (state_of(run) for run in (plain, loaded["weights"], loaded["everything"]))
    beta1, beta2 = 0.9, 0.999
    lr = 1e-3 / 4  # the first of three steps of warm-up
    names = [name[len("ema.") :] for name in after if name.startswith("ema.")]
    assert len(names) > 50
    for name in names:
        moment, square = after[f"optim.exp_avg.{name}"], after[f"optim.exp_avg_sq.{name}"]
        # Both runs see the same gradient, so their moments differ by what was there before.
        old = beta1 * before[f"optim.exp_avg.{name}"]
        torch.testing.assert_close(moment, fresh[f"optim.exp_avg.{name}"] + old, rtol=1e-9, atol=1e-15)
        old = beta2 * before[f"optim.exp_avg_sq.{name}"]
        torch.testing.assert_close(square, fresh[f"optim.exp_avg_sq.{name}"] + old, rtol=1e-9, atol=1e-18)
        count = STEPS + 1
        update = moment / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + 1e-8)
        weight = before[f"model.{name}"] - lr * update
        torch.testing.assert_close(after[f"model.{name}"], weight, rtol=1e-9, atol=1e-12)
        average = 0.9 * before[f"ema.{name}"] + 0.1 * after[f"model.{name}"]
        torch.testing.assert_close(after[f"ema.{name}"], average, rtol=1e-12, atol=1e-15)
        assert not torch.equal(before[f"ema.{name}"], before[f"model.{name}"])


def test_a_run_with_a_checkpoint_of_its_own_loads_no_other(
    loaded: dict[str, Run], plain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = loaded["weights"]
    with caplog.at_level(logging.INFO, logger="opensora"):
        train_here(config_of(run, *LATER, "train.steps=2", f"checkpoint.load={plain.folder}"))
    assert "attempt 2 continues from the checkpoint of step 1" in caplog.text
    assert_same_training(run, loaded["weights, two steps"])


def test_a_run_without_checkpoint_cannot_be_loaded(plain: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", plain.catalogue)
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        train_here(config_of(run, *LATER, f"checkpoint.load={tmp_path / 'nothing'}"))


# ---------------------------------------------------------------------------------- epochs, types, frozen weights


def test_epochs_end_a_run_and_resuming_across_their_border_is_exact(plain: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", plain.catalogue)
    for settings, steps in (("train.steps=2", 2), ("train.epochs=1", 3), ("train.epochs=2", 6)):
        other = "train.steps=null" if "epochs" in settings else "train.epochs=null"
        train_here(config_of(run, settings, other, "checkpoint.every_steps=0"))
        assert sorted(run.losses()) == list(range(1, steps + 1))
    assert [line["epoch"] for line in records_of(run) if "loss" in line] == [0, 0, 0, 1, 1, 1]
    assert_same_training(run, plain)


def test_bf16_trains_on_a_cpu_with_master_weights_in_fp32(plain: Run, tmp_path: Path) -> None:
    runs = {dtype: Run(tmp_path / dtype, plain.catalogue) for dtype in ("fp32", "bf16")}
    for dtype, run in runs.items():
        train_here(config_of(run, "train.steps=3", "checkpoint.every_steps=0", f"dtype={dtype}"))
    losses, exact = (list(runs[dtype].losses().values()) for dtype in ("bf16", "fp32"))
    assert losses == pytest.approx(exact, rel=0.02)
    assert abs(losses[0] / exact[0] - 1) > 1e-5, "too exact for bf16"
    assert {tensor.dtype for tensor in runs["bf16"].weights().values()} == {torch.float32}
    assert {tensor.dtype for tensor in state_of(runs["bf16"]).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("setting", "is_frozen"),
    [
        ("model.only_train_temporal=true", lambda name: not name.startswith("temporal_blocks.")),
        ("model.freeze_y_embedder=true", lambda name: name.startswith("y_embedder.")),
    ],
    ids=["only_train_temporal", "freeze_y_embedder"],
)
def test_frozen_weights_stay_bit_for_bit_and_the_others_learn(
    plain: Run, tmp_path: Path, setting: str, is_frozen: Any
) -> None:
    run = Run(tmp_path / "run", plain.catalogue)
    config = config_of(run, *LATER[1:2], "train.steps=3", "checkpoint.every_steps=0", setting)
    first = build_model(config, build_parts(config, torch.device("cpu"))).state_dict()
    train_here(config)
    state, exported = state_of(run), run.weights()
    assert set(exported) == set(first)
    for name, tensor in first.items():
        kept = is_frozen(name) or name in ("rope.freqs", "y_embedder.y_embedding")
        assert torch.equal(exported[name], tensor) == kept, name
        assert torch.equal(state[f"model.{name}"], tensor) == kept, name
        assert (f"optim.exp_avg.{name}" in state) == (not kept)


def test_frozen_weights_on_two_ranks_of_which_one_has_less_to_do(plain: Run, tmp_path: Path) -> None:
    settings = (
        "train.micro_batches_per_step=1", "train.steps=3", "model.only_train_temporal=true", "checkpoint.every_steps=0",
    )  # fmt: skip
    alone, shared = (Run(tmp_path / name, plain.catalogue) for name in ("alone", "shared"))
    train_here(config_of(alone, *settings))
    shared.train(2, *settings, "parallel.sharding=zero3")
    assert_same_training(shared, alone, tolerance=1e-10)
