"""The null caption: what a model sees where no text is given."""

from __future__ import annotations

from torch import Tensor, nn

from opensora.errors import ConfigError


def null_caption(y_embedder: nn.Module | None, n: int) -> Tensor:
    """The model's own null caption, `[n, 1, L, D]`.

    Args:
        y_embedder: The model's caption embedder, which holds it as `y_embedding [L, D]`.
        n: How many times.

    Raises:
        ConfigError: the text encoder has not been told which model it serves.
    """
    if y_embedder is None:
        raise ConfigError(
            "the text encoder does not know the model's null caption",
            hint="set text_encoder.y_embedder = model.y_embedder first",
        )
    embedding = y_embedder.get_buffer("y_embedding")
    return embedding[None, None].expand(n, -1, -1, -1)
