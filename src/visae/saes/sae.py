"""The sparse autoencoder: raw activations in, features, raw activations out.

    x' = (x − μ) / s        p = W_enc (x' − b_dec) + b_enc        f = sparsity(p) ≥ 0
    x̂  = s · (W_decᵀ f + b_dec) + μ

μ and s are part of the SAE, so no caller can forget the normalisation. Both weights hold one row
a feature; decoder rows have unit norm. Source: METHODS §1.

A transcoder (2406.11944) answers with the activation at another site, which has its own μ and s;
b_dec belongs to that site, so p = W_enc x' + b_enc.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import CheckpointError
from visae.saes.codes import SparseCodes, active_entries
from visae.saes.config import SAEConfig
from visae.saes.kernels.sparse import sparse_decode
from visae.saes.learned import LearnedSparsity, learned_codes

__all__ = ["SAE"]

_CHUNK_ELEMENTS = 2**25


class SAE(nn.Module):
    """A sparse autoencoder; ``encode`` and ``decode`` speak raw activations."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.n_features, config.d_model
        self.W_enc = nn.Parameter(torch.zeros(shape))
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.Parameter(torch.zeros(shape))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        self.learned = nn.ParameterDict(_learned(config))
        self.mean: Tensor
        self.scale: Tensor
        self.threshold: Tensor
        self.target_mean: Tensor
        self.target_scale: Tensor
        self.register_buffer("mean", torch.zeros(config.d_model))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((), -1.0))
        if config.transcoder:
            self.register_buffer("target_mean", torch.zeros(config.d_model))
            self.register_buffer("target_scale", torch.ones(()))

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.config.n_features

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.config.d_model

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What a learned sparsity kind reads: its own numbers and the encoder's bias."""
        return {**dict(self.learned.items()), "b_enc": self.b_enc}

    def normalise(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Normalised activations x' = (x − μ)/s, in float32."""
        return (x.float() - self.mean) / self.scale

    def normalise_target(self, y: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What ``restore`` undoes: the same as ``normalise`` unless this is a transcoder."""
        if not self.config.transcoder:
            return self.normalise(y)
        return (y.float() - self.target_mean) / self.target_scale

    def restore(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Raw activations x = s·x' + μ; of the target site, if this is a transcoder."""
        if self.config.transcoder:
            return x * self.target_scale + self.target_mean
        return x * self.scale + self.mean

    def centre(self, x_normal: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What the encoder's weights see: x' − b_dec, or x' in a transcoder."""
        return x_normal if self.config.transcoder else x_normal - self.b_dec

    def pre_activations(
        self, x_normal: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token feature"]:
        """Pre-activations p = W_enc (x' − b_dec) + b_enc of normalised activations."""
        return nn.functional.linear(self.centre(x_normal), self.W_enc, self.b_enc)

    def select_batch(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The codes of pre-activations as a training batch."""
        sparsity = self.config.sparsity
        if isinstance(sparsity, LearnedSparsity):
            return self._select(pre, self.vectors)
        return sparsity.select(pre)

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The codes of pre-activations at inference.

        Raises:
            CheckpointError: when the SAE needs a threshold and was never trained.
        """
        return self._select(pre, self.vectors)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "token d_model"]) -> SparseCodes:
        """Sparse codes of raw activations; memory grows with active features only."""
        chunks = self._chunks(x)
        return SparseCodes.join(
            [self.select(self.pre_activations(self.normalise(chunk))) for chunk in chunks]
        )

    def encode(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Feature activations of raw activations, zeros included; never negative."""
        return self.encode_sparse(x).dense()

    @torch.no_grad()
    def decode(self, f: Float[Tensor, "token feature"]) -> Float[Tensor, "token d_model"]:
        """Raw activations from feature activations."""
        return self.restore(f @ self.W_dec + self.b_dec)

    @torch.no_grad()
    def decode_sparse(self, codes: SparseCodes) -> Float[Tensor, "token d_model"]:
        """Raw activations from sparse codes."""
        return self.restore(sparse_decode(codes.values, self.W_dec, codes) + self.b_dec)

    def forward(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Reconstruction of raw activations."""
        return self.decode_sparse(self.encode_sparse(x))

    @torch.no_grad()
    def feature_activations(
        self, x: Float[Tensor, "token d_model"], features: list[int]
    ) -> Float[Tensor, "token chosen"]:
        """Activations of a few features: those columns of ``encode``, to float32 rounding.

        Cheap (no other feature is computed) unless the sparsity compares features with each other.

        Raises:
            CheckpointError: when the SAE needs a threshold and was never trained.
        """
        if self.config.sparsity.compares_features:
            return self.encode(x)[:, features]
        centred = self.centre(self.normalise(x))
        pre = nn.functional.linear(centred, self.W_enc[features], self.b_enc[features])
        chosen = {name: vector[features] for name, vector in self.vectors.items()}
        return self._select(pre, chosen).dense()

    def _select(
        self, pre: Float[Tensor, "token chosen"], vectors: Mapping[str, Float[Tensor, " chosen"]]
    ) -> SparseCodes:
        """The codes of pre-activations at inference, of all features or of some."""
        sparsity = self.config.sparsity
        if isinstance(sparsity, LearnedSparsity):
            entries = sparsity.candidates(pre, vectors)
            index = entries.features
            own = {name: vector.index_select(0, index) for name, vector in vectors.items()}
            return learned_codes(entries, sparsity.activate(entries.values, own))
        if not sparsity.uses_threshold:
            return sparsity.select(pre)
        if self.threshold < 0:
            raise CheckpointError(
                "This SAE has no threshold yet",
                where=f"sparsity {sparsity.kind}",
                fix="Train it for at least one step",
            )
        tokens, features = active_entries(pre > self.threshold)
        values = pre[tokens, features]
        return SparseCodes.from_entries(tokens, features, values, (pre.shape[0], pre.shape[1]))

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        step = max(1, _CHUNK_ELEMENTS // self.n_features)
        for start in range(0, max(1, x.shape[0]), step):
            yield x[start : start + step]


def _learned(config: SAEConfig) -> dict[str, nn.Parameter]:
    """The numbers that the sparsity kind learns for every feature, where they start."""
    if not isinstance(config.sparsity, LearnedSparsity):
        return {}
    return {
        name: nn.Parameter(torch.full((config.n_features,), vector.start))
        for name, vector in config.sparsity.vectors.items()
    }
