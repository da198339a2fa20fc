"""Decoder rows made of archetypes of the data: the relaxed archetypal SAE (2502.12892).

    W_dec,i = (A C + Λ)_i / ‖(A C + Λ)_i‖      A ≥ 0, its rows sum to 1      ‖Λ_i‖ ≤ δ

C are the centroids of a k-means of normalised activations; A and Λ are learned in place of W_dec.
Two SAEs of the same archetypes find much the same features, so compare seeds with archetypes of
their own: each seed clusters another half of the first tokens. This is a way to train, not another
model: the finished SAE holds the rows W_dec alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import ConfigError
from visae.saes.config import ArchetypesConfig

__all__ = ["Archetypes"]

_MAIN_SHARE = 0.8
_FULL_RATE_CENTROIDS = 32


class Archetypes(nn.Module):
    """A, C and Λ of one SAE in training.

    A step costs 6 · n_features · n_centroids · d_model operations more, and A with its Adam state
    takes 12 · n_features · n_centroids bytes.
    """

    def __init__(self, config: ArchetypesConfig, *, n_features: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.centroids: Tensor
        self.register_buffer("centroids", torch.zeros(config.n_centroids, d_model))
        self.weights = nn.Parameter(torch.zeros(n_features, config.n_centroids))
        self.offset = nn.Parameter(torch.zeros(n_features, d_model))

    @property
    def rate_share(self) -> float:
        """The share of the learning rate at which A learns: 32 / n_centroids, at most 1.

        Adam moves every one of a row's n_centroids shares by the learning rate, and they sum to
        one: at the full rate each step would overwrite the row. So A is the learned weights times
        this.
        """
        return min(1.0, _FULL_RATE_CENTROIDS / self.config.n_centroids)

    @property
    def mixture(self) -> Float[Tensor, "feature centroid"]:
        """A, with gradients."""
        return self.weights * self.rate_share

    @torch.no_grad()
    def start(self, x_normal: Float[Tensor, "token d_model"], *, seed: int) -> None:
        """Find the centroids; every row starts near one of them, no two rows alike.

        Raises:
            ConfigError: when half of the tokens are fewer than the centroids.
        """
        generator = torch.Generator().manual_seed(seed)
        half = torch.randperm(len(x_normal), generator=generator)[: (len(x_normal) + 1) // 2]
        n_centroids = self.config.n_centroids
        if len(half) < n_centroids:
            raise ConfigError(
                f"{n_centroids} centroids cannot be found in {len(half)} tokens",
                where="archetypes",
                fix=f"Give at most n_centroids {len(half)}, or larger batches",
            )
        self.centroids.copy_(_centroids(x_normal[half.to(x_normal.device)], n_centroids, seed))
        n_features = self.weights.shape[0]
        main = torch.arange(n_features) % n_centroids
        other = torch.randint(n_centroids, (n_features,), generator=generator)
        rows = torch.arange(n_features)
        start = torch.zeros(n_features, n_centroids)
        start[rows, main] += _MAIN_SHARE
        start[rows, other] += 1 - _MAIN_SHARE
        self.weights.copy_(start / self.rate_share)
        self.offset.zero_()

    def rows(self) -> Float[Tensor, "feature d_model"]:
        """The decoder's rows, with gradients for A and Λ."""
        return nn.functional.normalize(self.mixture @ self.centroids + self.offset, dim=1)

    @torch.no_grad()
    def hold(self) -> None:
        """Bring A and Λ back within their bounds, as after each step.

        Negative shares become zero and rows are divided by their sum; a row that has nothing left
        gets equal shares. Offsets that are too long are shortened to δ.
        """
        shares = self.mixture.relu()
        total = shares.sum(dim=1, keepdim=True)
        shares = torch.where(total > 0, shares / total, 1 / self.config.n_centroids)
        self.weights.copy_(shares / self.rate_share)
        length = self.offset.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.offset.mul_((self.config.delta / length).clamp(max=1.0))


def _centroids(
    x_normal: Float[Tensor, "token d_model"], n_centroids: int, seed: int
) -> Float[Tensor, "centroid d_model"]:
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(n_centroids, random_state=seed, n_init=1, batch_size=4096)
    return torch.from_numpy(found.fit(x_normal.cpu().float().numpy()).cluster_centers_)
