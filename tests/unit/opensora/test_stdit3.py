"""STDiT3 against frozen reference values, published shapes, and slow paths."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from opensora.errors import ConfigError, DataError, MissingExtraError
from opensora.models.layers.attention import rotary_table
from opensora.models.stdit.stdit3 import STDiT3, STDiT3_3B_2, STDiT3_XL_2
from opensora.registry import MODELS

SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 8}
FULL_AND_SHORT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
FRAME_MASK = torch.tensor([[True, False, True], [False, True, True]])


def waves(shape: tuple[int, ...], step: float, *, cosine: bool = False) -> Tensor:
    values = torch.arange(math.prod(shape), dtype=torch.float64) * step
    return (values.cos() if cosine else values.sin()).view(shape).float()


def fill(model: torch.nn.Module, *, amplitude: float, step: float) -> int:
    """Deterministic weights, by a rule that the recorded outputs of the reference were made with."""
    names = sorted(n for n in model.state_dict() if n != "rope.freqs" and "pos_embed" not in n)
    for i, name in enumerate(names):
        value = model.state_dict()[name]
        flat = amplitude * torch.sin(step * torch.arange(value.numel(), dtype=torch.float64) + i)
        if value.ndim == 1 and name.endswith("weight"):
            flat = flat + 1
        value.copy_(flat.view(value.shape))
    return len(names)


def small(**keywords: Any) -> STDiT3:
    return STDiT3(**{**SMALL, **keywords}).eval()


def inputs(**keywords: Any) -> dict[str, Any]:
    return {
        "x": waves((2, 4, 3, 5, 6), 0.9),
        "timestep": torch.tensor([500.0, 20.0]),
        "y": waves((2, 1, 8, 16), 0.8, cosine=True),
        "mask": FULL_AND_SHORT,
        "fps": 24,
        "height": 40,
        "width": 48,
        **keywords,
    }


@pytest.mark.parametrize(
    ("case", "total", "absolute", "first", "last"),
    [
        ({"mask": FULL_AND_SHORT}, 124.693028, 2801.468148, [2.853084, 1.859574, 2.903974, 1.859789],
         [-3.073677, -0.453646, -3.016413, -0.466832]),
        ({"mask": FULL_AND_SHORT, "x_mask": FRAME_MASK}, 142.225294, 3253.065694,
         [2.847713, 1.863996, 2.89896, 1.863665], [-3.069173, -0.467022, -3.012203, -0.479359]),
        ({"mask": None}, 124.680829, 2801.077644, [2.853084, 1.859574], [-3.072794, -0.45381, -3.015663, -0.466969]),
    ],
    ids=["plain", "frame mask", "no text mask"],
)  # fmt: skip
@torch.no_grad()
def test_outputs_equal_the_recorded_ones_of_the_reference(
    case: dict[str, Any], total: float, absolute: float, first: list[float], last: list[float]
) -> None:
    model = small()
    assert fill(model, amplitude=0.4, step=0.7) == 88
    out = model(**inputs(**case, num_frames=3, ar=40 / 48))
    assert out.shape == (2, 8, 3, 5, 6)
    assert out.sum().item() == pytest.approx(total, rel=1e-4)
    assert out.abs().sum().item() == pytest.approx(absolute, rel=1e-4)
    assert out.flatten()[: len(first)].tolist() == pytest.approx(first, rel=1e-4)
    assert out.flatten()[-len(last) :].tolist() == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "total", "absolute", "last"),
    [
        ({"mask": FULL_AND_SHORT}, 30.863488, 339.317099, [0.143045, 0.168057, 0.2139, 0.323605]),
        ({"mask": FULL_AND_SHORT, "x_mask": FRAME_MASK}, 32.780835, 328.761955, [0.143045, 0.168057, 0.2139, 0.323604]),
        ({"mask": None}, 30.863514, 339.318796, [0.143045, 0.168059, 0.2139, 0.323607]),
    ],
    ids=["plain", "frame mask", "no text mask"],
)
@torch.no_grad()
def test_outputs_equal_the_recorded_ones_for_slowly_varying_weights(
    case: dict[str, Any], total: float, absolute: float, last: list[float]
) -> None:
    model = small()
    fill(model, amplitude=0.05, step=0.1)
    slow = {"x": waves((2, 4, 3, 5, 6), 0.01), "y": waves((2, 1, 8, 16), 0.02, cosine=True)}
    out = model(**inputs(**slow, **case))
    assert out.sum().item() == pytest.approx(total, rel=1e-4)
    assert out.abs().sum().item() == pytest.approx(absolute, rel=1e-4)
    assert out.flatten()[:5].tolist() == pytest.approx([-0.36707, -0.151713, -0.468305, -0.149731, -0.629096], rel=1e-4)
    assert out.flatten()[-4:].tolist() == pytest.approx(last, rel=1e-4)


def published_shapes(C: int, heads: int) -> dict[str, tuple[int, ...]]:
    """The state dict of the published checkpoints, written down from their description."""

    def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "rope.freqs": (C // heads // 2,),
        "x_embedder.proj.weight": (C, 4, 1, 2, 2),
        "x_embedder.proj.bias": (C,),
        **linear("t_embedder.mlp.0", C, 256),
        **linear("t_embedder.mlp.2", C, C),
        **linear("fps_embedder.mlp.0", C, 256),
        **linear("fps_embedder.mlp.2", C, C),
        **linear("t_block.1", 6 * C, C),
        "y_embedder.y_embedding": (300, 4096),
        **linear("y_embedder.y_proj.fc1", C, 4096),
        **linear("y_embedder.y_proj.fc2", C, C),
        "final_layer.scale_shift_table": (2, C),
        **linear("final_layer.linear", 32, C),
    }
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)):
        shapes |= {
            f"{block}.scale_shift_table": (6, C),
            **linear(f"{block}.attn.qkv", 3 * C, C),
            f"{block}.attn.q_norm.weight": (C // heads,),
            f"{block}.attn.k_norm.weight": (C // heads,),
            **linear(f"{block}.attn.proj", C, C),
            **linear(f"{block}.cross_attn.q_linear", C, C),
            **linear(f"{block}.cross_attn.kv_linear", 2 * C, C),
            **linear(f"{block}.cross_attn.proj", C, C),
            **linear(f"{block}.mlp.fc1", 4 * C, C),
            **linear(f"{block}.mlp.fc2", C, 4 * C),
        }
    return shapes


@pytest.mark.parametrize(
    ("name", "C", "heads", "num_parameters"),
    [("STDiT3-XL/2", 1152, 16, 1_207_643_972), ("STDiT3-3B/2", 1872, 26, 3_182_211_572)],
)
def test_published_types_have_the_published_state_dict(name: str, C: int, heads: int, num_parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS.build({"type": name})
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(C, heads)
    assert len(model.state_dict()) == 973
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_rotary_frequencies_are_stored_but_not_trained() -> None:
    frequencies = small().rope.freqs
    assert not frequencies.requires_grad
    assert frequencies.tolist() == pytest.approx([10000 ** (-2 * i / 12) for i in range(6)])


def test_a_named_type_refuses_another_size() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="depth=2"):
        STDiT3_XL_2(depth=2)
    with torch.device("meta"), pytest.raises(ConfigError, match="hidden_size=48"):
        STDiT3_3B_2(hidden_size=48)


def test_an_unknown_keyword_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="enable_flashattn"):
        small(enable_flashattn=True)


@pytest.mark.parametrize("setting", ["enable_flash_attn", "enable_layernorm_kernel"])
def test_a_kernel_whose_package_is_absent_is_an_error(setting: str) -> None:
    package = {"enable_flash_attn": "flash_attn", "enable_layernorm_kernel": "apex"}[setting]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises((ConfigError, MissingExtraError), match=setting):
        small(**{setting: True})


def test_missing_sizes_are_an_error() -> None:
    with pytest.raises(ConfigError, match="fps=None"):
        small()(**inputs(fps=None))


@torch.no_grad()
def test_padding_tokens_have_no_effect() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    y = inputs()["y"]
    y_garbage = y.clone()
    y_garbage[1, :, 5:] = 1e3
    assert torch.equal(model(**inputs()), model(**inputs(y=y_garbage)))


@torch.no_grad()
def test_packed_text_equals_every_sample_alone_with_its_own_tokens() -> None:
    model = small().double()
    fill(model, amplitude=0.4, step=0.7)
    together = model(**inputs())
    for i, length in enumerate((8, 5)):
        batch = inputs()
        alone = model(
            **{**batch, "x": batch["x"][i : i + 1], "timestep": batch["timestep"][i : i + 1]}
            | {"y": batch["y"][i : i + 1, :, :length], "mask": None}
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_lengths_stand_for_a_mask_of_leading_tokens() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    expected = model(**inputs())
    assert torch.equal(model(**inputs(mask=[8, 5])), expected)
    assert torch.equal(model(**inputs(mask=torch.tensor([8, 5]))), expected)
    assert torch.equal(model(**inputs(mask=FULL_AND_SHORT[:, None, None])), expected)


@torch.no_grad()
def test_one_mask_row_and_one_frame_rate_serve_both_halves_of_guidance() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    short = torch.tensor([[1] * 5 + [0] * 3])
    halved = model(**inputs(mask=short, fps=torch.tensor([24.0]), height=torch.tensor([40]), width=[48]))
    full = model(**inputs(mask=short.repeat(2, 1), fps=torch.tensor([24.0, 24.0])))
    torch.testing.assert_close(halved, full)


def test_a_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\[3, 8\]"):
        small()(**inputs(mask=torch.ones(3, 8)))


def test_a_caption_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="caption 1"):
        small()(**inputs(mask=[8, 0]))


@torch.no_grad()
def test_text_encoded_before_gives_the_same_result() -> None:
    model, bare = small(), small(skip_y_embedder=True)
    fill(model, amplitude=0.4, step=0.7)
    bare.load_state_dict(model.state_dict())
    text, lengths = model.encode_text(inputs()["y"], FULL_AND_SHORT)
    assert text.shape == (1, 13, 48)
    assert lengths == [8, 5]
    expected = model(**inputs())
    assert torch.equal(bare(**inputs(y=text, mask=lengths)), expected)
    assert torch.equal(bare(**inputs(y=text, mask=torch.tensor(lengths))), expected)
    with pytest.raises(ConfigError, match="skip_y_embedder"):
        bare(**inputs(y=text, mask=None))


@torch.no_grad()
def test_a_dropped_caption_is_the_null_caption_at_its_own_length() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    nulled = inputs()["y"].clone()
    nulled[1, 0] = model.y_embedder.y_embedding
    dropped = model(**inputs(drop_text=torch.tensor([False, True])))
    assert torch.equal(dropped, model(**inputs(y=nulled)))
    assert not torch.equal(dropped, model(**inputs()))


@torch.no_grad()
def test_captions_are_dropped_at_random_in_training_only_and_only_unless_told() -> None:
    model = small(class_dropout_prob=1.0)
    fill(model, amplitude=0.4, step=0.7)
    kept = model(**inputs())
    model.train()
    assert torch.equal(model(**inputs(drop_text=torch.tensor([False, False]))), kept)
    assert torch.equal(model(**inputs()), model(**inputs(drop_text=torch.tensor([True, True]))))


@torch.no_grad()
def test_the_share_of_dropped_captions_is_the_probability() -> None:
    model = small(class_dropout_prob=0.25, depth=1).train()
    fill(model, amplitude=0.4, step=0.7)
    many = {"x": torch.zeros(2000, 4, 1, 2, 2), "timestep": torch.zeros(2000), "y": torch.ones(2000, 1, 8, 16)}
    torch.manual_seed(0)
    out = model(**inputs(**many, mask=None)).flatten(1)
    kept = model(**inputs(**many, mask=None, drop_text=torch.zeros(2000, dtype=torch.bool))).flatten(1)
    share = (out - kept).abs().amax(1).gt(1e-6).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.04)  # four standard deviations


@torch.no_grad()
def test_a_mask_without_conditioning_frames_changes_nothing() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    everything = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs(x_mask=everything)), model(**inputs()))


@torch.no_grad()
def test_conditioning_frames_are_at_time_zero_inside_the_blocks() -> None:
    model = small().double()
    fill(model, amplitude=0.4, step=0.7)
    hidden: list[Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(**inputs(x_mask=torch.zeros(2, 3, dtype=torch.bool)))
    model(**inputs(timestep=torch.zeros(2)))
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", [{"fps": 8}, {"height": 80}, {"timestep": torch.tensor([1.0, 2.0])}])
@torch.no_grad()
def test_every_condition_matters(setting: dict[str, Any]) -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    assert not torch.allclose(model(**inputs(**setting)), model(**inputs()), rtol=1e-3)


@torch.no_grad()
def test_a_new_model_is_an_image_model_applied_to_every_frame() -> None:
    torch.manual_seed(0)
    model = small()
    batch = inputs()
    out = model(**batch)
    assert torch.equal(model(**{**batch, "fps": 8}), out)
    for frame in range(3):
        alone = model(**{**batch, "x": batch["x"][:, :, frame : frame + 1]})
        torch.testing.assert_close(alone, out[:, :, frame : frame + 1])


def test_new_weights_are_distributed_as_in_the_original() -> None:
    torch.manual_seed(0)
    model = small(hidden_size=96, caption_channels=64)
    state = model.state_dict()
    qkv = state["spatial_blocks.0.attn.qkv.weight"]
    assert qkv.abs().max().item() == pytest.approx((6 / (96 + 288)) ** 0.5, rel=0.01)  # Xavier, uniform
    assert qkv.std().item() == pytest.approx((2 / (96 + 288)) ** 0.5, rel=0.05)
    assert state["fps_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["final_layer.linear.weight"].abs().max() > 0
    for name in ("spatial_blocks.0.scale_shift_table", "temporal_blocks.1.scale_shift_table"):
        assert state[name].std().item() == pytest.approx(96**-0.5, rel=0.15)
    assert state["y_embedder.y_embedding"].std().item() == pytest.approx(64**-0.5, rel=0.15)
    zero = {name.split(".", 2)[2] for name, value in state.items() if "temporal" in name and not value.any()}
    assert {"attn.proj.weight", "cross_attn.proj.weight", "mlp.fc2.weight"} < zero
    assert "mlp.fc1.weight" not in zero


@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "frame mask"])
def test_gradient_reaches_every_trained_parameter(with_mask: bool) -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    model(**inputs(x_mask=FRAME_MASK if with_mask else None)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_freezing_leaves_the_named_parts() -> None:
    temporal = {n.split(".")[0] for n, p in small(only_train_temporal=True).named_parameters() if p.requires_grad}
    assert temporal == {"temporal_blocks"}
    frozen = {n.split(".")[0] for n, p in small(freeze_y_embedder=True).named_parameters() if not p.requires_grad}
    assert frozen == {"y_embedder", "rope"}


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 5, 7), (3, 1, 1)])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 3, 2)])
@pytest.mark.parametrize("pred_sigma", [True, False])
def test_the_output_has_the_size_of_the_input(
    size: tuple[int, int, int], patch: tuple[int, int, int], pred_sigma: bool
) -> None:
    model = small(patch_size=list(patch), pred_sigma=pred_sigma, in_channels=6, depth=1)
    out = model(**inputs(x=torch.randn(2, 6, *size)))
    assert out.shape == (2, 12 if pred_sigma else 6, *size)
    assert not out._is_view()  # FSDP2 warns of views, and its backward hooks would be lost on them


@pytest.mark.parametrize(
    ("dtype", "returned", "tolerance"),
    [(torch.float64, torch.float64, 1e-5), (torch.bfloat16, torch.float32, 0.1), (torch.float16, torch.float32, 0.02)],
)
@torch.no_grad()
def test_lower_and_higher_precision_agree_with_fp32(
    dtype: torch.dtype, returned: torch.dtype, tolerance: float
) -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    expected = model(**inputs(x_mask=FRAME_MASK))
    out = model.to(dtype)(**inputs(x_mask=FRAME_MASK))
    assert out.dtype == returned
    assert ((out - expected).norm() / expected.norm()).item() < tolerance


def test_forward_and_backward_never_ask_the_device_for_a_value() -> None:
    """Tensors on the meta device have no values: whatever waits for one fails."""
    with torch.device("meta"):
        model = small().train()
        batch = {"x": torch.empty(2, 4, 3, 5, 6), "timestep": torch.empty(2), "y": torch.empty(2, 1, 8, 16)}
        x_mask, drop_text = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for lengths in ([8, 5], [8, 8], FULL_AND_SHORT):
        out = model(**batch, mask=lengths, x_mask=x_mask, drop_text=drop_text, fps=24, height=40, width=48)
        out.sum().backward()
        assert out.shape == (2, 8, 3, 5, 6)


def test_blocks_may_be_replaced_by_checkpointing_wrappers() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block
            self.calls = 0

        def forward(self, *arguments: Any) -> Any:
            self.calls += 1
            return torch.utils.checkpoint.checkpoint(self.block, *arguments, use_reentrant=False)

    plain, wrapped = small(), small()
    for model in (plain, wrapped):
        fill(model, amplitude=0.4, step=0.7)
    assert set(wrapped.blocks) == {"spatial_blocks", "temporal_blocks"}
    for blocks in wrapped.blocks.values():
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(block)
    for model in (plain, wrapped):
        model(**inputs(x_mask=FRAME_MASK)).square().mean().backward()
    assert {b.calls for blocks in wrapped.blocks.values() for b in blocks} == {1}
    gradients = {name.replace(".block.", "."): p.grad for name, p in wrapped.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_positions_cached_while_sampling_serve_training() -> None:
    model = small()
    fill(model, amplitude=0.4, step=0.7)
    with torch.inference_mode():
        sampled = model(**inputs())
    trained = model(**inputs())
    trained.sum().backward()
    assert torch.equal(sampled, trained.detach())


def test_late_frames_keep_their_place_in_bf16() -> None:
    """Rotary angles from frequencies rounded to bf16 would be off by a few degrees at frame 29."""
    angles = torch.acos(rotary_table(30, 12, device=torch.device("cpu"), dtype=torch.bfloat16)[0, 29, 0, 0].double())
    exact = torch.tensor([29 * 10000 ** (-2 * (i // 2) / 12) for i in range(12)], dtype=torch.float64)
    assert (angles.cos() - exact.cos()).abs().max() < 2**-8


@torch.no_grad()
def test_branches_are_dropped_in_training_only_and_more_of_them_further_up() -> None:
    model = small(drop_path=0.5, depth=3)
    fill(model, amplitude=0.4, step=0.7)
    assert [block.drop_path.rate for block in model.temporal_blocks] == pytest.approx([0.0, 0.25, 0.5])
    keep = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(model(**inputs()), model(**inputs()))
    torch.manual_seed(0)
    model.train()
    assert len({model(**inputs(drop_text=keep)).sum().item() for _ in range(4)}) > 1
