"""The sampling pipeline with a real small model, codec and text encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opensora.errors import ConfigError
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.text_encoder.hash import HashTextEncoder
from opensora.models.vae.codec import VideoCodec
from opensora.randomness import rng
from opensora.sampling.pipeline import SampleKey, SamplingPipeline, prepare_multi_resolution_info
from opensora.schedulers.rf import RFLOW


class Spy(nn.Module):
    """Wraps a model and keeps the arguments of its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.y_embedder = model.y_embedder
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, t: Tensor, **args: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "training": self.model.training, **args})
        out: Tensor = self.model(x, t, **args)
        return out


@pytest.fixture(scope="module")
def model() -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(
        hidden_size=32,
        depth=1,
        num_heads=2,
        in_channels=16,
        caption_channels=16,
        model_max_length=8,
        class_dropout_prob=0.5,
    )
    for parameter in model.parameters():  # zeros of the start would hide what conditions the output
        nn.init.normal_(parameter, std=0.1)
    return model


def make(model: nn.Module, **settings: Any) -> SamplingPipeline:
    settings = {"num_sampling_steps": 2, "use_timestep_transform": True, "cfg_scale": 2.0, **settings}
    text_encoder = HashTextEncoder(output_dim=16, model_max_length=8)
    return SamplingPipeline(model, VideoCodec(), text_encoder, RFLOW(**settings), device="cpu", dtype=torch.float32)


def sample(pipeline: SamplingPipeline, prompts: list[str], **keywords: Any) -> Tensor:
    keywords = {
        "num_frames": 17,
        "image_size": (16, 24),
        "fps": 24,
        "keys": [SampleKey(seed=1, row=i) for i in range(len(prompts))],
        **keywords,
    }
    return pipeline.sample(prompts, **keywords)


def test_a_clip_per_prompt_in_the_size_asked_for(model: STDiT3) -> None:
    out = sample(make(model), ["a cat", "a dog"])
    assert out.shape == (2, 3, 17, 16, 24)
    assert out.isfinite().all()
    assert sample(make(model), ["a cat"], num_frames=1).shape == (1, 3, 1, 16, 24)


def test_a_clip_does_not_depend_on_its_batch(model: STDiT3) -> None:
    prompts = ["a cat", "a dog runs", "a bird"]
    together = sample(make(model), prompts)
    for i, prompt in enumerate(prompts):
        alone = sample(make(model), [prompt], keys=[SampleKey(seed=1, row=i)])
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_noise_belongs_to_seed_row_draw_loop_and_step() -> None:
    shape = (2, 3)
    first = SampleKey(seed=5, row=7, draw=2)
    expected = rng(5, epoch=2, row=7, purpose="sample").standard_normal(shape, dtype=np.float32)
    assert np.array_equal(first.noise(shape), expected)
    others = [
        SampleKey(seed=6, row=7, draw=2).noise(shape),
        SampleKey(seed=5, row=8, draw=2).noise(shape),
        SampleKey(seed=5, row=7, draw=1).noise(shape),
        first.noise(shape, loop=1),
        first.noise(shape, step=0),
        first.noise(shape, step=1),
        first.noise(shape, loop=1, step=0),
    ]
    seen = {array.tobytes() for array in [expected, *others]}
    assert len(seen) == 8


def test_prompts_condition_the_clip_and_guidance_matters(model: STDiT3) -> None:
    key = [SampleKey(seed=1, row=0)]
    cat = sample(make(model), ["a cat"], keys=key)
    assert not torch.allclose(cat, sample(make(model), ["a dog"], keys=key))
    assert not torch.allclose(cat, sample(make(model), ["a cat"], keys=key, cfg_scale=5.0))
    assert not torch.allclose(cat, sample(make(model), ["a cat"], keys=[SampleKey(seed=2, row=0)]))


def test_the_model_is_evaluated_and_left_as_it_was(model: STDiT3) -> None:
    spy = Spy(model).train()
    spy.model.final_layer.eval()
    sample(make(spy), ["a cat"])
    assert [call["training"] for call in spy.calls] == [False, False]
    assert spy.training
    assert spy.model.training
    assert not spy.model.final_layer.training


def test_the_model_is_told_the_size_of_the_clip(model: STDiT3) -> None:
    spy = Spy(model)
    sample(make(spy), ["a cat", "a dog"])
    call = spy.calls[0]
    assert call["height"].tolist() == [16, 16]
    assert call["width"].tolist() == [24, 24]
    assert call["fps"].tolist() == [24, 24]
    assert "x_mask" not in call
    sample(make(spy), ["a cat"], num_frames=1)
    assert spy.calls[-1]["fps"].tolist() == [120]


def test_the_number_of_model_calls_depends_on_settings_alone(model: STDiT3) -> None:
    """Ranks that share a sharded model must call it equally often, whatever their prompts and references."""
    reference = torch.zeros(16, 1, 2, 3)
    counts = []
    for prompt, strategy in (("a", ""), ("a long prompt of many words", "0"), ("", "0,0,0,0,1,0.5")):
        spy = Spy(model)
        sample(make(spy), [prompt], num_sampling_steps=3, references=[[reference]], mask_strategies=[strategy])
        counts.append(len(spy.calls))
    assert counts == [3, 3, 3]


def test_a_kept_reference_frame_comes_out_as_it_went_in(model: STDiT3) -> None:
    pipeline = make(model)
    picture = torch.rand(1, 3, 1, 16, 24) * 2 - 1
    latent = pipeline.vae.encode(picture)[0]
    out = sample(pipeline, ["a cat"], references=[[latent]], mask_strategies=["0"])
    assert torch.allclose(out[0, :, 0], pipeline.vae.decode(latent[None], num_frames=1)[0, :, 0], atol=1e-5)


def test_edited_frames_get_the_same_noise_in_any_batch(model: STDiT3) -> None:
    latent = torch.zeros(16, 5, 2, 3)
    keys = [SampleKey(seed=3, row=i) for i in range(2)]
    settings: dict[str, Any] = {"num_sampling_steps": 4}
    both = sample(
        make(model), ["a", "b"], keys=keys, references=[[], [latent]], mask_strategies=["", "0,0,0,0,2,0.6"], **settings
    )
    alone = sample(
        make(model), ["b"], keys=keys[1:], references=[[latent]], mask_strategies=["0,0,0,0,2,0.6"], **settings
    )
    assert torch.allclose(both[1], alone[0], atol=1e-4)


def test_loops_continue_and_change_the_prompt(model: STDiT3) -> None:
    spy = Spy(model)
    pipeline = make(spy)
    seen: list[list[str]] = []
    encode = pipeline.text_encoder.encode
    pipeline.text_encoder.encode = lambda text: (seen.append(list(text)), encode(text))[1]  # type: ignore[method-assign]
    done: list[tuple[int, int]] = []
    out = sample(
        pipeline, ["|0|a cat|2|a dog"], num_frames=34, loop=3, on_step=lambda step, total: done.append((step, total))
    )
    assert out.shape[2] == 3 * 34 - 2 * 17
    assert seen == [["a cat"], ["a cat"], ["a dog"]]
    assert done == [(i, 6) for i in range(1, 7)]
    assert [bool(call["x_mask"][0, 0]) if "x_mask" in call else None for call in spy.calls] == [None] * 2 + [False] * 4
    first = sample(pipeline, ["a cat"], num_frames=34)
    assert torch.allclose(out[:, :, :34], first, atol=1e-5)


def test_a_loop_that_leaves_nothing_to_generate_is_refused(model: STDiT3) -> None:
    with pytest.raises(ConfigError, match="loop=2"):
        sample(make(model), ["a"], num_frames=17, loop=2)
    with pytest.raises(ConfigError, match="loop=2"):
        sample(make(model), ["a"], num_frames=40, loop=2)


def test_impossible_sizes_and_keys_are_refused(model: STDiT3) -> None:
    with pytest.raises(ConfigError, match="4x24"):
        sample(make(model), ["a"], image_size=(4, 24))
    with pytest.raises(ConfigError, match="1 keys"):
        sample(make(model), ["a", "b"], keys=[SampleKey(seed=1, row=0)])


def test_model_info_has_the_form_each_model_expects() -> None:
    info = prepare_multi_resolution_info("OpenSora", 2, (240, 426), 51, 24, "cpu", torch.float32)
    assert {name: value.tolist() for name, value in info.items()} == {
        "height": [240, 240],
        "width": [426, 426],
        "num_frames": [51, 51],
        "ar": pytest.approx([240 / 426] * 2),
        "fps": [24, 24],
    }
    pixart = prepare_multi_resolution_info("PixArtMS", 2, (512, 1024), 1, 24, "cpu", torch.float32)
    assert pixart["ar"].tolist() == [[0.5], [0.5]]
    assert pixart["hw"].tolist() == [[512, 1024]] * 2
    assert prepare_multi_resolution_info(None, 2, (8, 8), 1, 24, "cpu", torch.float32) == {}
    with pytest.raises(ConfigError, match="STDiT9"):
        prepare_multi_resolution_info("STDiT9", 2, (8, 8), 1, 24, "cpu", torch.float32)
