"""Exact sums over the codes of all tokens, from which a feature's statistics follow.

The sums of shards are added in shard order, so that an interrupted and resumed index equals an
uninterrupted one bit for bit.
"""

import dataclasses

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from visae.features.places import TokenPlaces
from visae.saes.codes import SparseCodes

__all__ = ["FeatureSums"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSums:
    """What is summed over tokens and images; memory grows with features × (patches + classes)."""

    n_tokens: int
    """Tokens seen."""
    n_images: int
    """Images seen."""
    n_tokens_active: Int64[Tensor, " feature"]
    """Tokens at which each feature fires."""
    n_special_active: Int64[Tensor, " feature"]
    """Of these, special tokens."""
    n_border_active: Int64[Tensor, " feature"]
    """Of these, patches at the border of the image."""
    total: Float64[Tensor, " feature"]
    """Sum of activations over all tokens."""
    patch_square_total: Float64[Tensor, " feature"]
    """Sum of squared activations over patches."""
    position_total: Float64[Tensor, "feature patch"]
    """Sum of activations over images, at each patch position."""
    largest: Float[Tensor, " feature"]
    """Largest activation; 0 for a feature that never fires."""
    n_images_active: Int64[Tensor, " feature"]
    """Images on which each feature fires."""
    class_images: Int64[Tensor, "feature class"]
    """Images of each class on which each feature fires."""
    class_weight: Float64[Tensor, "feature class"]
    """Sum over the images of each class of each feature's largest activation."""

    @classmethod
    def zero(cls, n_features: int, n_patches: int, n_classes: int) -> "FeatureSums":
        """The sums over no token."""

        def counts(*columns: int) -> Int64[Tensor, "..."]:
            return torch.zeros(n_features, *columns, dtype=torch.int64)

        return cls(
            n_tokens=0,
            n_images=0,
            n_tokens_active=counts(),
            n_special_active=counts(),
            n_border_active=counts(),
            total=counts().double(),
            patch_square_total=counts().double(),
            position_total=counts(n_patches).double(),
            largest=counts().float(),
            n_images_active=counts(),
            class_images=counts(n_classes),
            class_weight=counts(n_classes).double(),
        )

    @classmethod
    def of_shard(
        cls,
        codes: SparseCodes,
        image_max: SparseCodes,
        places: TokenPlaces,
        classes: Int64[Tensor, " image"],
        n_classes: int,
    ) -> "FeatureSums":
        """The sums of one shard; ``classes`` is −1 for an image without label."""
        n, features = codes.n_features, codes.features
        values = codes.values.double()
        patch = places.patch_of(codes.tokens)
        is_patch = patch >= 0
        at_border = is_patch.clone()
        at_border[is_patch] = places.is_border[patch[is_patch]]
        patch_key = features[is_patch] * places.n_patches + patch[is_patch]
        image_class = classes[image_max.tokens]
        labelled = image_class >= 0
        class_key = (image_max.features * n_classes + image_class)[labelled]
        return cls(
            n_tokens=codes.n_tokens,
            n_images=image_max.n_tokens,
            n_tokens_active=torch.bincount(features, minlength=n),
            n_special_active=torch.bincount(features[~is_patch], minlength=n),
            n_border_active=torch.bincount(features[at_border], minlength=n),
            total=_sum(features, values, (n,)),
            patch_square_total=_sum(features[is_patch], values[is_patch].square(), (n,)),
            position_total=_sum(patch_key, values[is_patch], (n, places.n_patches)),
            largest=torch.zeros(n).scatter_reduce_(0, features, codes.values, "amax"),
            n_images_active=torch.bincount(image_max.features, minlength=n),
            class_images=torch.bincount(class_key, minlength=n * n_classes).view(n, n_classes),
            class_weight=_sum(class_key, image_max.values[labelled].double(), (n, n_classes)),
        )

    def plus(self, other: "FeatureSums") -> "FeatureSums":
        """The sums over both shards."""
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in dataclasses.fields(self)
        }
        return FeatureSums(**sums | {"largest": torch.maximum(self.largest, other.largest)})


def _sum(
    keys: Int64[Tensor, " entry"], values: Float64[Tensor, " entry"], shape: tuple[int, ...]
) -> Float64[Tensor, "..."]:
    """The values that share a key, added in their order."""
    flat = torch.zeros(shape, dtype=torch.float64).flatten()
    return flat.index_add_(0, keys, values).view(shape)
