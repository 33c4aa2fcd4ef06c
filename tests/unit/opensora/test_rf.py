"""Rectified flow against golden values of the original, closed forms and its own promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.registry import SCHEDULERS
from opensora.schedulers.rf import RFLOW, formulas

SIZE = {"height": torch.tensor([240.0]), "width": torch.tensor([426.0])}


class StubText:
    """y is 1 for a caption and 0 for the null caption."""

    y_embedder = None

    def encode(self, text: list[str]) -> dict[str, Tensor]:
        return {"y": torch.ones(len(text), 1, 1, 1), "mask": torch.ones(len(text), 1)}

    def null(self, n: int) -> Tensor:
        return torch.zeros(n, 1, 1, 1)


class StubModel:
    """v = (0.3 y + 0.1) z - 0.2 t / 1000, in the first half of the channels; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, z: Tensor, t: Tensor, *, y: Tensor, **args: Any) -> Tensor:
        self.calls.append({"z": z, "t": t, "y": y, **args})
        v = (0.3 * y.reshape(-1, 1, 1, 1, 1) + 0.1) * z - 0.2 * t.reshape(-1, 1, 1, 1, 1) / 1000
        return torch.cat([v, torch.full_like(v, 99.0)], dim=1)


def start() -> Tensor:
    return torch.linspace(-1, 1, 8).reshape(1, 2, 2, 1, 2)


def sample(scheduler: RFLOW, z: Tensor, **keywords: Any) -> tuple[list[float], StubModel]:
    model = StubModel()
    out = scheduler.sample(model, StubText(), z, [""] * len(z), "cpu", progress=False, **keywords)
    return out.flatten().tolist(), model


def golden(*values: float) -> Any:
    return pytest.approx(values, abs=1.01e-4)


def test_noise_is_added_along_a_straight_line() -> None:
    x0 = torch.arange(8.0).reshape(1, 2, 2, 1, 2)
    out = RFLOW().add_noise(x0, -torch.ones_like(x0), torch.tensor([250.0]))
    assert out.flatten().tolist() == [-0.25, 0.5, 1.25, 2, 2.75, 3.5, 4.25, 5]


@pytest.mark.parametrize(("mask", "loss"), [(None, 13.0234), ([[True, False]], 8.8828)])
def test_loss_has_the_value_of_the_original(mask: list[list[bool]] | None, loss: float) -> None:
    x0 = torch.arange(8.0).reshape(1, 2, 2, 1, 2)
    result = RFLOW().training_losses(
        lambda x, t: torch.cat([0.5 * x, x], dim=1),
        x0,
        noise=-torch.ones_like(x0),
        mask=None if mask is None else torch.tensor(mask),
        t=torch.tensor([250.0]),
    )
    assert result["loss"].item() == pytest.approx(loss, abs=1e-4)
    assert result["weight"].item() == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_knows_the_answer_has_no_loss(masked: bool) -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False]] * 3) if masked else None
    result = RFLOW(sample_method="logit-normal").training_losses(
        lambda x, t, **_: torch.cat([x0 - noise, x], dim=1), x0, {"x_mask": mask}, noise=noise, mask=mask
    )
    assert result["loss"].abs().max() < 1e-12


def test_frames_given_to_the_model_are_exactly_clean() -> None:
    x0 = torch.randn(2, 4, 3, 2, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, x_mask: Tensor) -> Tensor:
        seen.append(x)
        return x

    RFLOW().training_losses(model, x0, {"x_mask": mask}, mask=mask)
    clean = ~mask[:, None, :, None, None].expand_as(x0)
    assert torch.equal(seen[0][clean], x0[clean])
    assert not torch.isclose(seen[0][~clean], x0[~clean]).any()


def test_a_sample_without_frames_to_predict_counts_nothing() -> None:
    x0 = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True, False, True]])
    result = RFLOW().training_losses(lambda x, t: x, x0, mask=mask)
    assert result["loss"][0] == 0
    assert result["loss"][1] > 0
    assert result["weight"].tolist() == [0, 1]
    (gradient,) = torch.autograd.grad(result["loss"].sum(), x0)
    assert gradient.isfinite().all()


def test_the_loss_works_with_a_model_that_predicts_no_variance() -> None:
    x0 = torch.randn(1, 4, 2, 2, 2)
    noise = torch.randn_like(x0)
    one = RFLOW().training_losses(lambda x, t: x, x0, noise=noise, t=torch.tensor([500.0]))
    two = RFLOW().training_losses(lambda x, t: torch.cat([x, -x], 1), x0, noise=noise, t=torch.tensor([500.0]))
    assert torch.equal(one["loss"], two["loss"])


@pytest.mark.parametrize(
    ("height", "width", "latent_frames", "expected"),
    [
        (512, 512, 1, [1000, 900, 500, 100, 1]),
        (144, 256, 5, [1000, 882.9962, 456.0859, 85.2288, 0.8387]),
        (240, 426, 15, [1000, 956.0796, 707.4931, 211.8208, 2.4153]),
        (360, 640, 60, [1000, 984.9299, 878.9616, 446.5572, 7.2167]),
        (720, 1280, 15, [1000, 984.9299, 878.9616, 446.5572, 7.2167]),
        (480, 854, 30, [1000, 984.0365, 872.5986, 432.1482, 6.8094]),
        (1024, 1024, 1, [1000, 947.3684, 666.6667, 181.8182, 1.998]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_times_shift_as_in_the_original(height: int, width: int, latent_frames: int, expected: list[float]) -> None:
    scheduler = RFLOW(use_timestep_transform=True)
    times = torch.tensor([1000, 900, 500, 100, 1.0], dtype=torch.float64)
    shifted = scheduler.transform_timesteps(times, {"height": height, "width": width}, num_latent_frames=latent_frames)
    assert shifted.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_shift_of_times_is_per_sample_and_needs_a_size() -> None:
    scheduler = RFLOW(use_timestep_transform=True)
    sizes = {"height": torch.tensor([512.0, 1024.0]), "width": torch.tensor([512.0, 1024.0])}
    shifted = scheduler.transform_timesteps(torch.tensor([500.0, 500.0]), sizes, num_latent_frames=1)
    assert shifted.tolist() == pytest.approx([500, 666.6667], abs=1e-3)
    with pytest.raises(ConfigError, match="height and width"):
        scheduler.transform_timesteps(torch.tensor([500.0]), {}, num_latent_frames=1)


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 6])
def test_short_clips_get_finite_times(latent_frames: int) -> None:
    scheduler = RFLOW(use_timestep_transform=True)
    times = scheduler.sampling_timesteps(SIZE, batch=1, num_latent_frames=latent_frames)
    assert times[0].item() == 1000
    assert ((times[1:] > 0) & (times[1:] < 1000)).all()


def test_thirty_transformed_steps_are_those_of_the_original() -> None:
    scheduler = RFLOW(use_timestep_transform=True, num_sampling_steps=30)
    times = scheduler.sampling_timesteps(SIZE, batch=1, num_latent_frames=15).flatten().tolist()
    assert len(times) == 30
    assert [*times[:4], *times[-3:]] == pytest.approx(
        [1000, 985.944, 971.315, 956.080, 211.821, 147.315, 76.983], abs=1e-3
    )


def test_the_strength_of_the_shift_is_the_same_in_loss_and_sampling() -> None:
    scheduler = RFLOW(use_timestep_transform=True, transform_scale=3.0, num_sampling_steps=4)
    trained = scheduler.timesteps_from_uniform(
        torch.tensor([0.75, 0.5], dtype=torch.float64), SIZE, num_latent_frames=5
    )
    sampled = scheduler.sampling_timesteps(SIZE, batch=1, num_latent_frames=5)
    assert trained.tolist() == pytest.approx(sampled[1:3, 0].tolist(), rel=1e-12)
    plain = RFLOW(use_timestep_transform=True).timesteps_from_uniform(
        torch.tensor([0.5], dtype=torch.float64), SIZE, num_latent_frames=5
    )
    assert trained[1] > plain[0]


@pytest.mark.parametrize(
    ("settings", "cdf"),
    [
        ({}, lambda p: p),
        (
            {"sample_method": "logit-normal", "loc": 0.3, "scale": 1.4},
            lambda p: 0.5 * (1 + torch.erf((torch.logit(p) - 0.3) / 1.4 / 2**0.5)),
        ),
    ],
    ids=["uniform", "logit-normal"],
)
def test_times_follow_the_configured_distribution(settings: dict[str, Any], cdf: Any) -> None:
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = RFLOW(**settings).timesteps_from_uniform(u, {}, num_latent_frames=5)
    assert torch.allclose(cdf(t / 1000), u, atol=1e-12)


def test_discrete_times_are_the_whole_numbers_below_the_last() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = RFLOW(use_discrete_timesteps=True).timesteps_from_uniform(u, {}, num_latent_frames=5)
    assert t.tolist() == list(range(1000))


def test_extreme_uniform_numbers_give_finite_times() -> None:
    u = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    for settings in ({}, {"sample_method": "logit-normal"}, {"use_discrete_timesteps": True}):
        t = RFLOW(use_timestep_transform=True, **settings).timesteps_from_uniform(u, SIZE, num_latent_frames=5)
        assert t.isfinite().all()
        assert ((t >= 0) & (t <= 1000)).all()


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
def test_times_drawn_in_the_loss_come_from_the_generator(method: str) -> None:
    scheduler = RFLOW(sample_method=method)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    for seed in (1, 1, 2):
        scheduler.training_losses(model, torch.zeros(4, 1, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    u = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(seen[0].double(), scheduler.timesteps_from_uniform(u, {}, num_latent_frames=1))


def test_weights_of_times_scale_the_loss() -> None:
    x0, noise = torch.randn(2, 3, 1, 1, 2, 2)
    t = torch.tensor([0.0, 499.7, 1000.0])
    plain = RFLOW().training_losses(lambda x, t: x, x0, noise=noise, t=t)["loss"]
    weighted = RFLOW().training_losses(lambda x, t: x, x0, noise=noise, t=t, weights=torch.arange(1000.0))["loss"]
    assert torch.allclose(weighted, plain * torch.tensor([0.0, 499, 999]))


def test_sampling_has_the_values_of_the_original() -> None:
    out, model = sample(RFLOW(num_sampling_steps=4, cfg_scale=7.0), start(), additional_args={"fps": torch.ones(1)})
    assert out == golden(-6.0995, -4.4504, -2.8013, -1.1521, 0.4970, 2.1462, 3.7953, 5.4445)
    first = model.calls[0]
    assert first["y"].flatten().tolist() == [1, 0]
    assert first["t"].tolist() == [1000, 1000]
    assert first["fps"].shape == (1,)
    assert "x_mask" not in first


class TwoOfFifteen(RFLOW):
    """The golden values were made with two latent frames and the shift of 51 pixel frames, that is of 15 latents."""

    def transform_timesteps(self, t: Tensor, model_kwargs: Any, *, num_latent_frames: int) -> Tensor:
        return super().transform_timesteps(t, model_kwargs, num_latent_frames=15)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, (-5.7535, -4.1986, -2.6436, -1.0887, 0.4663, 2.0212, 3.5762, 5.1311)),
        ([[1.0, 1.0]], (-5.7535, -4.1986, -2.6436, -1.0887, 0.4663, 2.0212, 3.5762, 5.1311)),
        ([[1.0, 0.0]], (-5.7535, -4.1986, -0.4286, -0.1429, 0.4663, 2.0212, 0.7143, 1.0)),
        ([[1.0, 0.8]], (-5.7535, -4.1986, 0.5996, 0.8604, 0.4663, 2.0212, 1.6428, 1.9036)),
    ],
    ids=["no mask", "all new", "one kept", "one edited"],
)
def test_shifted_and_masked_sampling_has_the_values_of_the_original(
    mask: list[list[float]] | None, expected: tuple[float, ...]
) -> None:
    scheduler = TwoOfFifteen(num_sampling_steps=4, cfg_scale=7.0, use_timestep_transform=True)
    out, model = sample(
        scheduler,
        start(),
        additional_args=SIZE,
        mask=None if mask is None else torch.tensor(mask),
        fresh_noise=lambda i: torch.full((1, 2, 2, 1, 2), 0.5),
    )
    assert out == golden(*expected)
    if mask is not None:
        assert model.calls[0]["x_mask"].tolist() == [[value == 1 for value in mask[0]]] * 2


def test_a_kept_frame_is_returned_bit_for_bit() -> None:
    z = torch.randn(2, 4, 5, 3, 3)
    mask = torch.ones(2, 5)
    mask[0, 0] = mask[1, 3:] = 0
    model = StubModel()
    out = RFLOW(use_timestep_transform=True).sample(
        model, StubText(), z, ["a", "b"], "cpu", SIZE, mask=mask, progress=False
    )
    kept = (mask == 0)[:, None, :, None, None].expand_as(z)
    assert torch.equal(out[kept], z[kept])
    assert not torch.isclose(out[~kept], z[~kept]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [64, 77, 144, 333, 854])
def test_new_frames_are_generated_from_the_first_step_on(dtype: torch.dtype, side: int) -> None:
    """Rounding in the shift must not put the first time above 1000, where no frame would be active."""
    sizes = {"height": side, "width": side}
    model = StubModel()
    RFLOW(use_timestep_transform=True, num_sampling_steps=2).sample(
        model, StubText(), start().to(dtype), [""], "cpu", sizes, mask=torch.ones(1, 2), progress=False
    )
    assert model.calls[0]["x_mask"].all()


def test_a_linear_field_is_integrated_to_its_closed_form() -> None:
    """dz/dtau = -v = -0.4 z without guidance: z(0) = z(1) exp(0.4)."""
    z = start().double()

    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return 0.4 * x

    out = RFLOW(num_sampling_steps=4000, cfg_scale=1.0).sample(model, StubText(), z, [""], "cpu", progress=False)
    assert torch.allclose(out, z * np.exp(0.4), rtol=1e-4)


def test_guidance_of_one_asks_the_model_only_once_per_step_and_changes_nothing() -> None:
    out, model = sample(RFLOW(num_sampling_steps=3), start(), guidance_scale=1.0)
    near, _ = sample(RFLOW(num_sampling_steps=3), start(), guidance_scale=1.0 + 1e-9)
    assert len(model.calls) == 3
    assert all(len(call["z"]) == 1 and len(call["y"]) == 1 for call in model.calls)
    assert out == pytest.approx(near, rel=1e-6)


def test_discrete_sampling_uses_whole_times() -> None:
    _, model = sample(RFLOW(num_sampling_steps=3, use_discrete_timesteps=True), start())
    assert [call["t"][0].item() for call in model.calls] == [1000, 667, 333]


def test_the_caller_learns_of_every_step_and_may_set_their_number() -> None:
    seen: list[tuple[int, int]] = []
    sample(RFLOW(), start(), num_sampling_steps=3, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_half_precision_latents_are_integrated_in_fp32() -> None:
    model = StubModel()
    out = RFLOW().sample(model, StubText(), start().bfloat16(), [""], "cpu", progress=False)
    assert out.dtype == torch.float32


def test_the_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    RFLOW(num_sampling_steps=2).sample(StubModel(), StubText(), start(), [""], "cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sampling" in captured.err


def test_settings_are_checked_by_name_and_value() -> None:
    with pytest.raises(ConfigError, match="cfg_scal") as error:
        SCHEDULERS.build({"type": "rflow", "cfg_scal": 7.0})
    assert error.value.hint == "did you mean 'cfg_scale'?"
    with pytest.raises(ConfigError, match="discrete"):
        RFLOW(use_discrete_timesteps=True, sample_method="logit-normal")
    assert SCHEDULERS.build({"type": "rflow", "cfg_scale": 7.0}).config.cfg_scale == 7.0


def test_open_soras_inner_scheduler_is_reachable() -> None:
    x = torch.randn(1, 1, 1, 2, 2)
    inner = RFLOW().scheduler
    assert torch.equal(inner.add_noise(x, -x, torch.tensor([500.0])), torch.zeros_like(x))


def test_the_path_starts_at_data_and_ends_at_noise() -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2)
    assert torch.equal(formulas.interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(formulas.interpolate(x0, noise, torch.ones(2)), noise)
