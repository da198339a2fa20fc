"""Text towers of transformers: those of CLIP, SigLIP and SigLIP 2."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.files import ModelFiles
from visae.models.transformers_files import (
    build_from_tensors,
    find_transformers,
    read_config,
    read_some_tensors,
    require_transformers,
)
from visae.storage.hub import first_lines

__all__ = ["Scores", "TransformersTexts", "load_transformers_texts"]

_TEXTS_AT_ONCE = 256
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


class _Kind(NamedTuple):
    """The text tower of a family."""

    network: str  # its class
    output: str  # where its output has the vectors
    scores: Literal["softmax", "sigmoid"]


_KINDS = {
    "clip": _Kind("CLIPTextModelWithProjection", "text_embeds", "softmax"),
    "siglip": _Kind("SiglipTextModel", "pooler_output", "sigmoid"),
    "siglip2": _Kind("Siglip2TextModel", "pooler_output", "sigmoid"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How cosines become logits."""

    kind: Literal["softmax", "sigmoid"]
    """Softmax over all texts, or the sigmoid of each alone."""
    scale: float
    """What a cosine is multiplied by."""
    bias: float
    """What is then added."""


@final
class TransformersTexts:
    """The text tower of a frozen transformers model; ``load_text_tower`` makes one."""

    def __init__(self, network: nn.Module, tokenizer: Any, *, output: str, scores: Scores) -> None:
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._output = output
        self._scores = scores

    @property
    def kind(self) -> Literal["softmax", "sigmoid"]:
        """Softmax for CLIP, sigmoid for SigLIP."""
        return self._scores.kind

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied by."""
        return self._scores.scale

    @property
    def logit_bias(self) -> float:
        """What is then added; 0 where the model has none."""
        return self._scores.bias

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "text d_embedding"]:
        """What ``get_text_features`` gives for each text, not normalised; 256 texts at a time.

        Every text is padded to the full context, as SigLIP was trained; CLIP looks at no padding.

        Raises:
            ModelError: when there are no texts.
        """
        if not texts:
            raise ModelError("There are no texts to encode", fix="Give at least one")
        device = next(self._network.parameters()).device
        parts = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = self._tokenizer(
                list(texts[start : start + _TEXTS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=cast(Any, self._network).config.max_position_embeddings,
                return_tensors="pt",
            )
            given = self._network(input_ids=tokens["input_ids"].to(device))
            parts.append(getattr(given, self._output))
        return torch.cat(parts)


def load_transformers_texts(
    config: ModelConfig, name: str, device: torch.device
) -> TransformersTexts:
    """The text tower that belongs to a transformers vision tower, with its tokenizer.

    Raises:
        ModelError: when the model has none, or its tokenizer's files are missing, and as for the
            vision tower.
    """
    with find_transformers(config, name) as files:
        settings = read_config(files)
        kind = _KINDS.get(settings.model_type)
        if kind is None:
            raise ModelError(
                f"{files.name} has no text tower: it is {settings.model_type}",
                where="--model",
                fix=f"Use a model of one of these families: {', '.join(sorted(_KINDS))}",
            )
        tensors = read_some_tensors(
            files, config.weights, lambda tensor: tensor.startswith(("text_", "logit_"))
        )
        tokenizer = _tokenizer(files)
    scores = _scores(tensors, kind, files)
    text_config = settings.text_config
    text_config.projection_dim = getattr(settings, "projection_dim", None)
    network = build_from_tensors(kind.network, text_config, tensors)
    return TransformersTexts(network.to(device), tokenizer, output=kind.output, scores=scores)


def _scores(tensors: dict[str, Tensor], kind: _Kind, files: ModelFiles) -> Scores:
    """Scale and bias, taken out of a checkpoint's tensors."""
    scale, bias = tensors.pop("logit_scale", None), tensors.pop("logit_bias", None)
    if scale is None or (bias is None and kind.scores == "sigmoid"):
        raise ModelError(
            f"The weights of {files.name} lack the scale or bias of its scores",
            where=files.folder,
            fix="Use weights of both towers",
        )
    return Scores(
        kind=kind.scores,
        scale=float(scale.float().exp()),
        bias=0.0 if bias is None else float(bias),
    )


def _tokenizer(files: ModelFiles) -> Any:
    fix = "Put the tokenizer's files beside the weights"
    files.require(*_TOKENIZER_FILES, fix=fix)
    for file in _TOKENIZER_FILES:
        files.find(file)
    try:
        return require_transformers().AutoTokenizer.from_pretrained(
            files.folder, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as failure:
        raise ModelError(
            f"The tokenizer of {files.name} cannot be loaded: {first_lines(failure)}",
            where=files.folder,
            fix=fix,
        ) from failure
