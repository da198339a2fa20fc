"""The ``VisionModel`` extension point: record tokens at sites, and resume from one of them.

A site is written ``residual@9``, ``mlp@9``, ``attention@9`` (0-based block index; residual is the
block's output), ``heads@9`` (the outputs of all attention heads, one after another), ``heads@9.3``
(head 3 alone) or as a module path. Tokens always have the model's ``Layout``: special tokens
first, then patches row by row.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing

__all__ = ["Output", "TextTower", "Trace", "VisionModel"]


class Output(NamedTuple):
    """What the whole network gives for a batch of images."""

    tokens: Float[Tensor, "image token d_out"]
    """Final tokens, after the last norm."""
    logits: Float[Tensor, "image class"] | None
    """The model's own classification head, where it has one."""
    embedding: Float[Tensor, "image d_embedding"] | None = None
    """The vector that is compared with texts, not normalised, where the model has a text tower."""


class Trace(NamedTuple):
    """One forward pass, kept so that the network can be resumed."""

    tokens: Mapping[str, Float[Tensor, "image token d_model"]]
    """Activations at each site asked for."""
    entry: Mapping[str, Tensor]
    """For each site, what the part of the network that is run again starts from."""
    output: Output
    """The output of the unedited pass."""

    def repeat(self, site: str, n_copies: int) -> "Trace":
        """The same images ``n_copies`` times, copy after copy, for one site (no output kept)."""
        entry = self.entry[site]
        return Trace(
            tokens={},
            entry={site: entry.repeat(n_copies, *(1,) * (entry.ndim - 1))},
            output=self.output,
        )


@runtime_checkable
class VisionModel(Protocol):
    """A frozen vision model. Implementations never train and never change their weights."""

    @property
    def identity(self) -> ModelIdentity:
        """Name, title and weight hash."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become its input."""

    @property
    def sites(self) -> Sequence[str]:
        """The named sites; module paths are accepted besides."""

    def layout(self, site: str) -> Layout:
        """Token layout at a site.

        Raises:
            ModelError: when there is no such site (with the nearest ones).
        """

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""

    def tokens(
        self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]
    ) -> Mapping[str, Float[Tensor, "image token d_model"]]:
        """Activations at some sites, as ``trace`` gives them, without the rest of the pass."""

    def trace(self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]) -> Trace:
        """Activations at some sites and the output, from one forward pass."""

    def resume(
        self, trace: Trace, site: str, tokens: Float[Tensor, "image token d_model"]
    ) -> Output:
        """The output when the activations at ``site`` are ``tokens``.

        With the trace's own tokens this is the plain forward pass, bit for bit on the CPU.
        """


@runtime_checkable
class TextTower(Protocol):
    """The text side of a model whose ``Output.embedding`` is compared with texts."""

    @property
    def kind(self) -> Literal["softmax", "sigmoid"]:
        """How scores become probabilities: over all texts (CLIP), or of each alone (SigLIP)."""

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied by."""

    @property
    def logit_bias(self) -> float:
        """What is then added; 0 where the model has none."""

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "text d_embedding"]:
        """The vector of each text, not normalised."""
