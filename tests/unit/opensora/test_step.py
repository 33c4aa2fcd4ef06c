"""One micro-batch: what is drawn for it, what the model is given, and what its loss weighs."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from opensora.config.components import CodecConfig, HashTextConfig, RFlowConfig, STDiT3Config
from opensora.config.train import DataConfig, LoopConfig, TrainConfig
from opensora.datasets.bucket import Bucket, BucketShape
from opensora.datasets.loader import ClipBatch
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.text_encoder.hash import HashTextEncoder
from opensora.models.vae.codec import VideoCodec
from opensora.schedulers.rf import RFLOW
from opensora.training.step import DiffusionStep, WeightedLoss, num_tokens

CHANNELS = 4
ENTRY: BucketShape = next(iter(Bucket({"144p": {17: (1.0, 2)}}).entries))


class Recorder(nn.Module):
    """Predicts a velocity of zero, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, timestep: Tensor, **given: Any) -> Tensor:
        self.calls.append((x, timestep, given))
        return torch.zeros_like(x).repeat(1, 2, 1, 1, 1)


class Flat:
    """Clips to latents of noise that depends on the clip, without the cost of a transform."""

    def encode(self, x: Tensor) -> Tensor:
        return x[:, :1, ::2].repeat(1, CHANNELS, 1, 1, 1)


def config_for(*, dtype: Literal["fp64", "fp32"] = "fp64", model: Any = None, **train: Any) -> TrainConfig:
    return TrainConfig(
        run_uri="memory://run",
        seed=5,
        dtype=dtype,
        model=STDiT3Config(hidden_size=16, depth=2, num_heads=2, **(model or {})),
        vae=CodecConfig(channels=CHANNELS),
        text_encoder=HashTextConfig(output_dim=8, model_max_length=6),
        scheduler=RFlowConfig(use_timestep_transform=True),
        data=DataConfig(path="clips.csv", bucket_config={"144p": {17: (1.0, 2)}}),
        train=LoopConfig(steps=1, **train),
    )


def step_for(config: TrainConfig, model: nn.Module, *, vae: Any = None) -> DiffusionStep:
    return DiffusionStep(
        model,
        vae=vae or Flat(),
        text_encoder=HashTextEncoder(output_dim=8, model_max_length=6),
        scheduler=RFLOW(use_timestep_transform=True),
        config=config,
        device=torch.device("cpu"),
    )


def stdit3(config: TrainConfig, *, seed: int = 0) -> STDiT3:
    """A model all of whose weights say something."""
    torch.manual_seed(seed)
    model = STDiT3(
        hidden_size=16, depth=2, num_heads=2, in_channels=CHANNELS, caption_channels=8, model_max_length=6,
        only_train_temporal=config.model.only_train_temporal, freeze_y_embedder=config.model.freeze_y_embedder,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name != "rope.freqs":
            nn.init.normal_(parameter, std=0.2)
    return model.to(torch.float64 if config.dtype == "fp64" else torch.float32)


def batch_of(ids: list[int], *, epoch: int = 0, frames: int = 6, size: tuple[int, int] = (4, 4)) -> ClipBatch:
    """Clips whose pixels follow from their ids."""
    count = len(ids)
    clips = [torch.rand(3, frames, *size, generator=torch.Generator().manual_seed(number)) for number in ids]
    return ClipBatch(
        shape=BucketShape(**{**vars(ENTRY), "num_frames": frames, "height": size[0], "width": size[1]}),
        rows=list(range(count)),
        ids=ids,
        epoch=epoch,
        video=torch.stack(clips) * 2 - 1,
        text=[f"clip number {number}" for number in ids],
        fps=torch.tensor([24.0 + number % 3 for number in ids]),
        height=torch.full((count,), float(size[0])),
        width=torch.full((count,), float(size[1])),
        num_frames=torch.full((count,), float(frames)),
        ar=torch.full((count,), size[0] / size[1]),
        skipped=[],
    )


MASKS = {"random": 0.4, "image_head": 0.3}


def test_what_is_drawn_for_a_clip_does_not_depend_on_its_companions_or_their_order() -> None:
    step = step_for(config_for(mask_ratios=MASKS, model={"class_dropout_prob": 0.5}), Recorder())
    ids = list(range(40))
    together = step.prepare(batch_of(ids, epoch=3))
    for group in (ids[::-1], ids[1::3], [7]):
        apart = step.prepare(batch_of(group, epoch=3))
        assert torch.equal(apart.latents, together.latents[group])
        assert torch.equal(apart.noise, together.noise[group])
        assert torch.equal(apart.timesteps, together.timesteps[group])
        assert apart.mask is not None
        assert together.mask is not None
        assert torch.equal(apart.mask, together.mask[group])
        assert torch.equal(apart.model_kwargs["drop_text"], together.model_kwargs["drop_text"][group])


def test_every_clip_epoch_and_seed_has_draws_of_its_own() -> None:
    config = config_for(mask_ratios={"random": 1.0}, model={"class_dropout_prob": 0.5})
    step = step_for(config, Recorder())
    ids = list(range(200))
    first, second = (step.prepare(batch_of(ids, epoch=epoch)) for epoch in (0, 1))
    values = torch.cat([first.timesteps, second.timesteps, first.noise[:, 0, 0, 0, 0], second.noise[:, 0, 0, 0, 0]])
    assert len(set(values.tolist())) == 800
    assert first.mask is not None
    assert second.mask is not None
    assert not torch.equal(first.mask, second.mask)
    assert not torch.equal(first.model_kwargs["drop_text"], second.model_kwargs["drop_text"])


def test_captions_are_dropped_and_frames_given_as_often_as_configured() -> None:
    masks = {"image_head": 0.3, "image_tail": 0.2}
    step = step_for(config_for(mask_ratios=masks, model={"class_dropout_prob": 0.25}), Recorder())
    count = 4000
    example = step.prepare(batch_of(list(range(count)), size=(2, 2)))
    dropped = example.model_kwargs["drop_text"]
    assert example.mask is not None
    head, tail = ~example.mask[:, 0], ~example.mask[:, -1]
    for flags, share in ((dropped, 0.25), (head, 0.3), (tail, 0.2), (dropped & head, 0.25 * 0.3)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(float(flags.double().mean()) - share) < 4 * deviation
    assert example.mask[:, 1].all()
    # Rectified flow shifts its times towards data for clips this small; undone, they are uniform.
    ratio = (2 * 2 / 512**2 * example.latents.shape[2]) ** 0.5
    times = example.timesteps / 1000
    uniform = times / (ratio + (1 - ratio) * times)
    assert float((uniform.sort().values - (torch.arange(count) + 0.5) / count).abs().max()) < 1.63 / count**0.5


def test_no_mask_is_drawn_where_none_is_configured() -> None:
    model = Recorder()
    step = step_for(config_for(), model)
    example = step.prepare(batch_of([1, 2]))
    step.loss(example)
    assert example.mask is None
    assert model.calls[0][2].get("x_mask") is None


def test_the_model_is_given_the_mask_the_dropped_captions_and_the_sizes_in_pixels() -> None:
    model = Recorder()
    step = step_for(config_for(mask_ratios={"image_head": 1.0}, model={"class_dropout_prob": 1.0}), model)
    batch = batch_of([4, 5], size=(4, 6))
    example = step.prepare(batch)
    step.loss(example)
    x, timestep, given = model.calls[0]
    assert torch.equal(timestep, example.timesteps)
    assert given["x_mask"].tolist() == [[False, True, True]] * 2
    assert torch.equal(x[:, :, 0], example.latents[:, :, 0]), "a frame that is given is clean"
    tau = (timestep / 1000).reshape(-1, 1, 1, 1, 1)
    expected = (1 - tau) * example.latents + tau * example.noise
    torch.testing.assert_close(x[:, :, 1:], expected[:, :, 1:], rtol=1e-12, atol=1e-12)
    assert given["drop_text"].tolist() == [True, True]
    assert torch.equal(given["fps"], batch.fps)
    assert (given["height"], given["width"], given["num_frames"]) == (4, 6, 6)
    assert given["ar"] == pytest.approx(4 / 6)
    assert given["y"].shape == (2, 1, 6, 8)
    assert given["y"].dtype == torch.float64
    assert given["mask"].sum(1).tolist() == [4, 4], "three words and the end"


@pytest.mark.parametrize(("probability", "same"), [(1.0, True), (0.0, False)], ids=["all dropped", "none dropped"])
def test_a_dropped_caption_says_nothing_to_the_model(probability: float, same: bool) -> None:
    config = config_for(model={"class_dropout_prob": probability})
    step = step_for(config, stdit3(config).train())
    batch, other = batch_of([1, 2]), batch_of([1, 2])
    other.text = ["a red ball", "some blue water"]
    losses = [float(step.loss(step.prepare(each)).numerator.detach()) for each in (batch, other)]
    assert (losses[0] == losses[1]) == same


def test_the_model_draws_nothing_itself() -> None:
    config = config_for(mask_ratios=MASKS, model={"class_dropout_prob": 0.5})
    step = step_for(config, stdit3(config).train())
    state = torch.get_rng_state()
    losses = [float(step.loss(step.prepare(batch_of([1, 2, 3]))).numerator.detach()) for _ in range(2)]
    step.idle_loss()
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_what_the_model_sees_has_the_type_of_the_run(dtype: Literal["fp64", "fp32"]) -> None:
    example = step_for(config_for(dtype=dtype), Recorder()).prepare(batch_of([1]))
    expected = torch.float64 if dtype == "fp64" else torch.float32
    assert {example.latents.dtype, example.noise.dtype, example.model_kwargs["y"].dtype} == {expected}


# ------------------------------------------------------------------------------------------------------- losses


def per_sample(step: DiffusionStep, batch: ClipBatch) -> Tensor:
    """Mean square of the velocity over the frames to predict, written down once more; a model that says 0."""
    example = step.prepare(batch)
    losses = []
    for index in range(len(batch.ids)):
        frames = example.mask[index] if example.mask is not None else torch.ones(3, dtype=torch.bool)
        velocity = (example.latents[index] - example.noise[index])[:, frames]
        losses.append(float((velocity**2).sum() / velocity.numel()))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["unmasked", "masked"])
@pytest.mark.parametrize("weighting", ["micro_batch", "sample", "token"])
def test_a_step_is_the_mean_that_its_weighting_names(weighting: str, masks: dict[str, float] | None) -> None:
    step = step_for(config_for(loss_weighting=weighting, mask_ratios=masks), Recorder())
    small, large = batch_of([1, 2, 3], size=(4, 4)), batch_of([4], size=(6, 10))
    parts: list[WeightedLoss] = [step.loss(step.prepare(batch)) for batch in (small, large)]
    loss = sum(float(part.numerator.detach()) for part in parts) / sum(part.denominator for part in parts)
    a, b = per_sample(step, small), per_sample(step, large)
    tokens = (3 * 2 * 2, 3 * 3 * 5)  # three latent frames, patches of 1 x 2 x 2
    expected = {
        "micro_batch": (a.mean() + b.mean()) / 2,
        "sample": (a.sum() + b.sum()) / 4,
        "token": (a.sum() * tokens[0] + b.sum() * tokens[1]) / (3 * tokens[0] + tokens[1]),
    }
    assert loss == pytest.approx(float(expected[weighting]), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "patch", "count"),
    [((1, 4, 5, 30, 53), (1, 2, 2), 5 * 15 * 27), ((2, 4, 5, 4, 4), (2, 2, 2), 3 * 2 * 2)],
)
def test_tokens_are_patches_with_padded_borders(
    shape: tuple[int, ...], patch: tuple[int, int, int], count: int
) -> None:
    assert num_tokens(torch.empty(shape), patch) == count


# --------------------------------------------------------------------------------------------------- idle ranks


@pytest.mark.parametrize("masks", [None, MASKS], ids=["unmasked", "masked"])
@pytest.mark.parametrize("frozen", [None, "freeze_y_embedder", "only_train_temporal"])
def test_an_idle_rank_adds_exactly_zero_to_every_gradient(masks: dict[str, float] | None, frozen: str | None) -> None:
    config = config_for(dtype="fp32", mask_ratios=masks, model={frozen: True} if frozen else None)
    model = stdit3(config).train()
    loss = step_for(config, model).idle_loss()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) > 20
    for name, parameter in trainable.items():
        assert parameter.grad is not None, f"{name} takes no part"
        assert not parameter.grad.any(), f"{name} is pushed"


def test_gradients_reach_the_same_parameters_whether_idle_or_not() -> None:
    config = config_for(mask_ratios=MASKS)
    reached = []
    for idle in (True, False):
        model = stdit3(config).train()
        step = step_for(config, model)
        loss = step.idle_loss() if idle else step.loss(step.prepare(batch_of([1, 2]))).numerator
        loss.backward()  # type: ignore[no-untyped-call]
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1]


# --------------------------------------------------------------------------------------------------- validation


def test_validation_is_the_same_at_every_call_in_every_epoch_and_any_company() -> None:
    step = step_for(config_for(mask_ratios=MASKS, model={"class_dropout_prob": 0.5}), Recorder())
    example = step.prepare_validation(batch_of([3, 4, 5]))
    for other, rows in (([3, 4, 5], [0, 1, 2]), ([5, 3], [2, 0])):
        again = step.prepare_validation(batch_of(other, epoch=9))
        assert torch.equal(again.noise, example.noise[rows])
        assert torch.equal(again.latents, example.latents[rows])
    assert example.mask is None
    assert "x_mask" not in example.model_kwargs
    assert "drop_text" not in example.model_kwargs
    assert not torch.equal(example.noise, step.prepare(batch_of([3, 4, 5])).noise)


def test_validation_measures_the_times_it_is_asked_for() -> None:
    model = Recorder()
    step = step_for(config_for(), model)
    example = step.prepare_validation(batch_of([1, 2]))
    step.loss(example, timesteps=torch.full((2,), 250.0))
    x, timestep, _ = model.calls[0]
    assert timestep.tolist() == [250.0, 250.0]
    torch.testing.assert_close(x, 0.75 * example.latents + 0.25 * example.noise, rtol=1e-12, atol=1e-12)


def test_clips_go_through_a_real_codec_and_model() -> None:
    """Latents of the codec's time grid; the loss depends on the pixels and its gradient reaches the weights."""
    config = config_for(mask_ratios=MASKS)
    model = stdit3(config).train()
    step = step_for(config, model, vae=VideoCodec(channels=CHANNELS))
    losses = []
    for ids in ([1, 2], [3, 4]):
        example = step.prepare(batch_of(ids, frames=17, size=(16, 24)))
        assert example.latents.shape == (2, CHANNELS, 5, 2, 3)
        loss = step.loss(example)
        loss.numerator.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.numerator.detach()))
    assert losses[0] != losses[1]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_layers_left_out_follow_from_the_clip_whatever_was_drawn_before() -> None:
    config = config_for(model={"drop_path": 0.5})
    torch.manual_seed(0)
    model = STDiT3(
        hidden_size=16,
        depth=4,
        num_heads=2,
        in_channels=CHANNELS,
        caption_channels=8,
        model_max_length=6,
        drop_path=0.5,
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    step = step_for(config, model.train())
    examples = [step.prepare(batch_of([number])) for number in range(3)]
    first = [step.loss(example).numerator.item() for example in examples]
    torch.rand(7)
    again = [step.loss(example).numerator.item() for example in reversed(examples)]
    assert again[::-1] == first
    with_all = step_for(config, model.eval())
    assert all(with_all.loss(example).numerator.item() != loss for example, loss in zip(examples, first, strict=True))
