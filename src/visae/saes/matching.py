"""Whether an SAE and an activation store belong together.

An SAE of another model, site or token policy reads any activations of the right width without
complaint and gives numbers that mean nothing. Every stage that joins the two asks here first.
"""

from collections.abc import Iterator
from typing import NamedTuple

from visae.activations.stored import StoredTokens
from visae.errors import CheckpointError
from visae.models.config import ModelIdentity
from visae.models.preprocessing import Preprocessing
from visae.saes.checkpoint import SAERecord
from visae.storage.records import to_plain

__all__ = ["require_match"]


class _Difference(NamedTuple):
    """One thing in which an SAE and a store differ."""

    name: str
    of_sae: object
    of_store: object

    def __str__(self) -> str:
        return f"{self.name}: {self.of_sae} for the SAE, {self.of_store} in the store"


def require_match(record: SAERecord, store: StoredTokens, site: str | None = None) -> str:
    """The site at which the SAE reads this store; ``site`` is the one asked for, if any.

    The store need not be the one that the SAE was trained on, but model weights, site, width and
    preprocessing must be the same, and the tokens that the SAE reads must be among those kept.

    Raises:
        CheckpointError: naming each difference and the remedy, or when the SAE is a transcoder,
            whose reconstruction is not of what it reads.
    """
    if record.transcoder:
        raise CheckpointError(
            "This SAE is a transcoder: it gives the activations at "
            f"{record.provenance.target_site}, not those that it reads",
            where=f"site {record.provenance.site}",
            fix="Encode and decode with load_sae, or use an SAE of one site here",
        )
    own = record.provenance.site
    asked = own if site is None else site
    if asked != own or own not in store.sites:
        there = asked if asked != own else ", ".join(store.sites)
        _refuse([_Difference("site", own, there)], store, f"Record {own} with the same model")
    if different := list(_differences(record, store, own)):
        fix = "Give the store that the SAE was trained on, or record these images as it was"
        _refuse(different, store, fix)
    return own


def _differences(record: SAERecord, store: StoredTokens, site: str) -> Iterator[_Difference]:
    made, kept = record.provenance, store
    if not made.model.same_weights(kept.identity):
        yield _Difference("model", _name(made.model), _name(kept.identity))
    if record.d_model != store.site(site).d_model:
        yield _Difference("d_model", record.d_model, store.site(site).d_model)
    if kept.tokens not in ("all", made.tokens):
        yield _Difference("tokens", made.tokens, kept.tokens)
    yield from _preprocessing_differences(made.preprocessing, kept.preprocessing)


def _preprocessing_differences(
    sae: Preprocessing | None, store: Preprocessing | None
) -> Iterator[_Difference]:
    """What differs where both are known."""
    if sae is None or store is None:
        return
    of_sae, of_store = to_plain(sae), to_plain(store)
    for name, value in of_sae.items():
        if value != of_store[name]:
            yield _Difference(f"preprocessing {name}", value, of_store[name])


def _name(model: ModelIdentity) -> str:
    """Title and the start of the weights' hash, which tells models of one name apart."""
    return f"{model.title} ({model.weights_sha256[:8]})"


def _refuse(differences: list[_Difference], store: StoredTokens, fix: str) -> None:
    raise CheckpointError(
        f"This SAE was not made for this store ({'; '.join(map(str, differences))})",
        where=store.folder,
        fix=fix,
    )
