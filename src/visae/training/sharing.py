"""A batch shared out among processes: each computes on some of its tokens, all make one step.

With equal shares the mean of the shares' gradients is the batch's, so every process moves its copy
of the weights in the same way. BatchTopK keeps the largest values of the whole batch. One process
alone has the whole batch, and nothing is exchanged.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from visae.distributed import Ranks
from visae.saes.codes import SparseCodes
from visae.saes.learned import AnySparsity
from visae.saes.sparsity import BatchTopK

__all__ = ["Share"]


@final
class Share:
    """One process's share of every batch, and what it learns of the others'."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @property
    def is_whole(self) -> bool:
        """Whether this process has the whole batch."""
        return self.ranks.world_size == 1

    def of(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's tokens of a batch."""
        if self.is_whole:
            return dict(tokens)
        mine = slice(self.ranks.rank, None, self.ranks.world_size)
        return {site: values[mine].contiguous() for site, values in tokens.items()}

    def average(self, *tensors: Float[Tensor, "..."]) -> None:
        """Replace tensors by their means over the shares."""
        for tensor in () if self.is_whole else tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.ranks.world_size)

    def total(self, counts: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """The sum of some counts over the shares."""
        if not self.is_whole:
            torch.distributed.all_reduce(counts)
        return counts

    def either(self, mask: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Where any share's mask holds."""
        return mask if self.is_whole else self.total(mask.long()) > 0

    def smallest(self, values: Float[Tensor, " entry"]) -> Float[Tensor, ""]:
        """The smallest value of all shares, infinite where there is none."""
        least = values.min() if values.numel() else values.new_tensor(torch.inf)
        if not self.is_whole:
            torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
        return least

    def wider(self, sparsity: AnySparsity, n_features: int) -> AnySparsity:
        """What surely keeps those entries of this share that the whole batch keeps."""
        if self.is_whole or not isinstance(sparsity, BatchTopK):
            return sparsity
        return BatchTopK(k=min(sparsity.k * self.ranks.world_size, n_features))

    def settle(self, codes: SparseCodes, sparsity: AnySparsity) -> SparseCodes:
        """Of the codes that the wider sparsity keeps, those that the whole batch keeps."""
        if self.is_whole or not isinstance(sparsity, BatchTopK):
            return codes
        everywhere = self._gathered(codes.values)
        n_kept = sparsity.k * codes.n_tokens * self.ranks.world_size
        if everywhere.numel() <= n_kept:
            return codes
        kept = codes.values >= everywhere.topk(n_kept, sorted=False).values.min()
        shape = codes.n_tokens, codes.n_features
        entries = codes.tokens[kept], codes.features[kept], codes.values[kept]
        return SparseCodes.from_entries(*entries, shape)

    def _gathered(self, values: Float[Tensor, " entry"]) -> Float[Tensor, " any_entry"]:
        """The values of all shares, one after the other."""
        sizes = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in self._others()]
        own_size = torch.tensor(values.shape[0], device=values.device)
        torch.distributed.all_gather(sizes, own_size)
        longest = max(map(int, sizes))
        padded = torch.cat([values, values.new_zeros(longest - values.shape[0])])
        parts = [torch.empty_like(padded) for _ in self._others()]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def _others(self) -> range:
        return range(self.ranks.world_size)
