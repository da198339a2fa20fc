"""Text towers of open_clip."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.open_clip_files import find_open_clip, require_open_clip
from visae.models.open_clip_models import load_open_clip_network
from visae.storage.hub import first_lines

__all__ = ["OpenClipTexts", "load_open_clip_texts"]

_TEXTS_AT_ONCE = 256


@final
class OpenClipTexts:
    """The text tower of a frozen open_clip model; ``load_text_tower`` makes one."""

    def __init__(self, network: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer

    @property
    def kind(self) -> Literal["softmax", "sigmoid"]:
        """Sigmoid where the model has learned a bias, as SigLIP has."""
        return "softmax" if self._network.logit_bias is None else "sigmoid"

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied by."""
        return float(self._network.logit_scale.exp())

    @property
    def logit_bias(self) -> float:
        """What is then added; 0 where the model has none."""
        bias = self._network.logit_bias
        return 0.0 if bias is None else float(bias)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "text d_embedding"]:
        """What ``encode_text`` gives for each text, not normalised; 256 texts at a time.

        Raises:
            ModelError: when there are no texts.
        """
        if not texts:
            raise ModelError("There are no texts to encode", fix="Give at least one")
        device = self._network.logit_scale.device
        parts = [
            self._network.encode_text(
                self._tokenizer(list(texts[start : start + _TEXTS_AT_ONCE])).to(device),
                normalize=False,
            )
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)


def load_open_clip_texts(config: ModelConfig, name: str, device: torch.device) -> OpenClipTexts:
    """The text tower that belongs to an open_clip image tower, with its tokenizer.

    Raises:
        ModelError: as for the image tower, or when the tokenizer's files are missing.
    """
    with find_open_clip(config, name) as source:
        network = load_open_clip_network(source, image_size=config.image_size)
        try:
            tokenizer = require_open_clip().get_tokenizer(source.tokenizer)
        except (OSError, ValueError, ImportError, AttributeError, TypeError) as failure:
            raise ModelError(
                f"The tokenizer of {source.name} cannot be loaded: {first_lines(failure)}",
                where=source.tokenizer,
                fix="Put the tokenizer's files beside the weights, or connect to the network",
            ) from failure
    del cast(Any, network).visual
    return OpenClipTexts(network.to(device), tokenizer)
