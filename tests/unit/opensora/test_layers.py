"""The shared layers against closed forms and slow, obvious versions of themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from opensora.errors import DataError
from opensora.models.layers.attention import CrossAttention, RMSNorm, SelfAttention, TextLayout, rotary_table, rotate
from opensora.models.layers.embedders import MLP, PatchEmbed3D, position_embedding, sinusoid, unpatchify
from opensora.models.layers.modulation import DropPath, FinalLayer

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sinusoid_has_the_recorded_values() -> None:
    expected = [-0.8838, 0.9650, 0.2837, 0.8776, -0.4678, -0.2624, -0.9589, 0.4794]
    assert sinusoid(torch.tensor([500]), 8)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_sinusoid_keeps_fp32_times_apart_that_bf16_would_merge() -> None:
    values = sinusoid(torch.tensor([900.0, 900.5]), 256)
    assert values.dtype == torch.float32
    assert not torch.allclose(values[0], values[1], atol=0.1)


def test_position_embedding_has_the_recorded_values() -> None:
    table = position_embedding(2, 3, 16, scale=0.5, base_size=2, device=CPU, dtype=torch.float32)
    assert table.shape == (6, 16)
    expected = [0.9719, 0.1329, 0.0133, 0.0013, 0.2352, 0.9911, 0.9999, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert table[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert table[3, 8:].tolist() == pytest.approx([0.9093, 0.1987, 0.02, 0.002, -0.4161, 0.9801, 0.9998, 1], abs=1e-4)


def test_rotary_embedding_turns_each_pair_by_position_times_frequency() -> None:
    x = randn(1, 7, 2, 3, 12)
    turned = rotate(x, rotary_table(7, 12, device=CPU, dtype=torch.float64))
    for position in (0, 1, 6):
        for pair in range(6):
            a, b = x[..., position, :, :, 2 * pair], x[..., position, :, :, 2 * pair + 1]
            angle = position * 10000 ** (-2 * pair / 12)
            expected_a, expected_b = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
            torch.testing.assert_close(turned[..., position, :, :, 2 * pair], expected_a)
            torch.testing.assert_close(turned[..., position, :, :, 2 * pair + 1], expected_b)


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(12).double()
    nn.init.normal_(norm.weight)
    x = randn(2, 5, 12)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_self_attention_is_softmax_attention_along_its_axis(axis: str, qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(24, 2, axis=axis, qk_norm=qk_norm, flash=False).double()  # type: ignore[arg-type]
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = randn(2, 4, 3, 24)
    table = rotary_table(4, 12, device=CPU, dtype=torch.float64) if axis == "temporal" else None

    q, k, v = (part.view(2, 4, 3, 2, 12) for part in attention.qkv(x).chunk(3, dim=-1))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if table is not None:
        q, k = rotate(q, table), rotate(k, table)
    score, mix = {
        "spatial": ("btqhd,btkhd->bthqk", "bthqk,btkhd->btqhd"),
        "temporal": ("bqshd,bkshd->bshqk", "bshqk,bkshd->bqshd"),
    }[axis]
    weights = (torch.einsum(score, q, k) / math.sqrt(12)).softmax(-1)
    expected = attention.proj(torch.einsum(mix, weights, v).flatten(-2))
    torch.testing.assert_close(attention(x, table), expected)


@pytest.mark.parametrize("lengths", [[3, 7, 1], [4, 4, 4]], ids=["uneven", "even"])
def test_cross_attention_to_packed_text_equals_the_padded_reference(lengths: list[int]) -> None:
    torch.manual_seed(0)
    attention = CrossAttention(24, 2).double()
    x, padded = randn(3, 2, 5, 24), randn(3, 9, 24, seed=1).requires_grad_()
    valid = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)

    q = attention.q_linear(x).view(3, 10, 2, 12)
    k, v = attention.kv_linear(padded).view(3, 9, 2, 2, 12).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(12)
    weights = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    expected = attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(3, 2, 5, 24))

    out = attention(x, padded[valid], TextLayout.build(lengths, device=CPU))
    torch.testing.assert_close(out, expected)
    target = randn(*out.shape, seed=2)
    (gradient,) = torch.autograd.grad(out, padded, target)
    (expected_gradient,) = torch.autograd.grad(expected, padded, target)
    torch.testing.assert_close(gradient, expected_gradient)


def test_text_of_no_tokens_is_an_error_that_names_the_caption() -> None:
    with pytest.raises(DataError, match="caption 2"):
        TextLayout.build([3, 1, 0], device=CPU)


@pytest.mark.parametrize("size", [(4, 6, 6), (3, 5, 7)], ids=["whole patches", "padded"])
def test_patch_embedding_is_a_strided_convolution(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    embed = PatchEmbed3D((2, 3, 2), 4, 10).double()
    x = randn(2, 4, *size)
    pad = [-n % p for n, p in zip(size, (2, 3, 2), strict=True)]
    convolved = embed.proj(F.pad(x, (0, pad[2], 0, pad[1], 0, pad[0])))
    torch.testing.assert_close(embed(x), convolved.flatten(3).permute(0, 2, 3, 1))


def test_unpatchify_puts_every_value_in_its_place() -> None:
    pt, ph, pw, channels = 2, 3, 2, 5
    x = randn(1, 2, 2 * 4, pt * ph * pw * channels)
    out = unpatchify(x, (pt, ph, pw), (3, 6, 7))
    assert out.shape == (1, channels, 3, 6, 7)
    for c, t, row, column in [(0, 0, 0, 0), (4, 2, 5, 6), (2, 1, 3, 4), (3, 2, 2, 1)]:
        inside = ((t % pt * ph + row % ph) * pw + column % pw) * channels + c
        assert out[0, c, t, row, column] == x[0, t // pt, row // ph * 4 + column // pw, inside]


def test_mlp_uses_the_tanh_form_of_gelu() -> None:
    mlp = MLP(1, 1, 1).double()
    for linear in (mlp.fc1, mlp.fc2):
        nn.init.ones_(linear.weight)
        nn.init.zeros_(linear.bias)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    expected = 0.35 * (1 + math.tanh(math.sqrt(2 / math.pi) * (0.7 + 0.044715 * 0.7**3)))
    assert mlp(x).item() == pytest.approx(expected, rel=1e-9)


def test_final_layer_normalises_conditioning_frames_twice() -> None:
    layer = FinalLayer(8, 3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x, time, time_zero = randn(1, 2, 4, 8), randn(1, 8, seed=2), randn(1, 8, seed=3)

    def once(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + layer.scale_shift_table[1] + at) + layer.scale_shift_table[0] + at

    out = layer(x, time, frame_mask=torch.tensor([[True, False]]), time_zero=time_zero)
    torch.testing.assert_close(out[:, 0], layer.linear(once(x[:, 0], time)))
    torch.testing.assert_close(out[:, 1], layer.linear(once(once(x[:, 1], time), time_zero)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3))
    assert out.flatten(1).std(dim=1).max() == 0
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.04)
    assert torch.equal(drop.eval()(torch.ones(5, 2)), torch.ones(5, 2))
