"""Seeded word embeddings: every word of any language has a vector, and nothing is downloaded or learnt.

A word's vector is drawn from a normal distribution by a generator whose seed is a hash of the word, so it is the same
on every machine. Related words are unrelated vectors; what captions mean is left to the model's caption embedder.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from opensora.errors import ConfigError
from opensora.models.layers.embedders import sinusoid
from opensora.models.text_encoder.null import null_caption

END = "</s>"
"""Stands at the end of every caption, so that an empty one has a token too."""

POSITION_AMPLITUDE = 0.25
"""Size of the position signal beside words of unit variance: enough to tell "red on blue" from "blue on red"."""


def split_words(caption: str) -> list[str]:
    """Lower-case words and numbers ("6.5" and "don't" stay whole); punctuation and spacing carry no meaning."""
    text = unicodedata.normalize("NFKC", caption).lower().replace("’", "'")
    return re.findall(r"\d+(?:[.,]\d+)+|\w+(?:'\w+)*", text)


class HashTextEncoder:
    """Captions to word embeddings.

    Args:
        output_dim: Width of a token embedding.
        model_max_length: Longest caption in tokens, its end token included; the rest is cut.
        seed: Another seed gives every word another vector.
        device: Where the embeddings go.
        dtype: Their type.
    """

    def __init__(
        self,
        output_dim: int = 64,
        model_max_length: int = 32,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if output_dim < 2 or output_dim % 2 or model_max_length < 1:
            raise ConfigError(
                f"text_encoder.output_dim={output_dim}, text_encoder.model_max_length={model_max_length}",
                hint="use an even width from 2, and at least one token",
            )
        self.output_dim = output_dim
        self.model_max_length = model_max_length
        self.y_embedder: nn.Module | None = None
        self._seed = seed
        self._device = torch.device(device)
        self._dtype = dtype
        self._vectors: dict[str, Tensor] = {}
        self._positions = POSITION_AMPLITUDE * 2**0.5 * sinusoid(torch.arange(model_max_length), output_dim)

    def encode(self, text: Sequence[str]) -> dict[str, Tensor]:
        """`y [B, 1, L, D]` with zeros behind the end of a caption, and `mask [B, L]` of its tokens, on the CPU.

        The mask stays on the CPU because models need the caption lengths as numbers.
        """
        y = torch.zeros(len(text), 1, self.model_max_length, self.output_dim)
        mask = torch.zeros(len(text), self.model_max_length, dtype=torch.int64)
        for row, caption in enumerate(text):
            words = [*split_words(caption)[: self.model_max_length - 1], END]
            y[row, 0, : len(words)] = (
                torch.stack([self._vector(word) for word in words]) + self._positions[: len(words)]
            )
            mask[row, : len(words)] = 1
        return {"y": y.to(self._device, self._dtype), "mask": mask}

    def null(self, n: int) -> Tensor:
        """The null caption of the model, `[n, 1, L, D]`."""
        return null_caption(self.y_embedder, n)

    def _vector(self, word: str) -> Tensor:
        if word not in self._vectors:
            digest = hashlib.blake2b(f"{self._seed}/{word}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            self._vectors[word] = torch.from_numpy(generator.standard_normal(self.output_dim, dtype=np.float32))
        return self._vectors[word]
