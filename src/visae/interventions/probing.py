"""The linear probe of an experiment: its features from the store or the images, trained once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError, ModelError
from visae.images.source import ImageSource
from visae.interventions.batches import traced_images
from visae.interventions.spec import LinearProbeConfig
from visae.interventions.tasks import LinearProbe, fit_linear_probe, pool_tokens
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.storage.hashing import hash_json

__all__ = ["obtain_probe"]


def obtain_probe(
    config: LinearProbeConfig,
    store: ActivationStore,
    model: VisionModel,
    source: ImageSource,
    rows: Sequence[int],
    *,
    folder: Path,
    progress: ProgressCallback = silent,
) -> LinearProbe:
    """The probe saved in ``folder`` if it was trained on these images, else a new one.

    Raises:
        ExperimentError: when fewer than two classes are labelled, or a saved probe is of another
            model.
    """
    labelled = [row for row in rows if store.images.labels[row] is not None]
    digest = hash_json([store.images.content_ids[row] for row in labelled])
    if (folder / "probe.json").is_file():
        probe = LinearProbe.load(folder)
        probe.require_model(model.identity)
        if probe.image_ids_digest == digest and probe.pool == config.pool:
            return probe
    classes = sorted({store.images.labels[row] or "" for row in labelled})
    if len(classes) < 2:
        raise ExperimentError(
            f"A probe needs two classes or more; the discovery images have {len(classes)}",
            where="labels",
            fix="Give images with labels: class subfolders, or a manifest with a label column",
        )
    position = {name: index for index, name in enumerate(classes)}
    probe = fit_linear_probe(
        _pooled(config, store, model, source, labelled, progress),
        torch.tensor([position[store.images.labels[row] or ""] for row in labelled]),
        classes=classes,
        model=model.identity,
        layout=model.layout(store.sites[0]),
        pool=config.pool,
        image_ids_digest=digest,
    )
    probe.save(folder)
    return probe


def _pooled(
    config: LinearProbeConfig,
    store: ActivationStore,
    model: VisionModel,
    source: ImageSource,
    rows: Sequence[int],
    progress: ProgressCallback,
) -> Float[Tensor, "image d_out"]:
    """Pooled final tokens, read from the store where it holds them, else computed."""
    if config.site in store.sites and _holds_all_tokens(store, config.site):
        wanted = torch.tensor(sorted(rows))
        parts = []
        for shard in store.shards(config.site, "all"):
            inside = (wanted >= shard.first_image) & (
                wanted < shard.first_image + shard.activations.shape[0]
            )
            tokens = shard.activations[wanted[inside] - shard.first_image].float()
            parts.append(pool_tokens(tokens, config.pool, store.site(config.site).layout))
        order = torch.argsort(torch.argsort(torch.tensor(list(rows))))
        return torch.cat(parts)[order]
    site, pooled = store.sites[0], []
    for batch in traced_images(store, source, model, site, rows, batch_size=32):
        tokens = batch.trace.output.tokens
        pooled.append(pool_tokens(tokens, config.pool, model.layout(site)).cpu())
        done = sum(len(part) for part in pooled)
        progress(Progress(stage="probe", done=done, total=len(rows), unit="images"))
    return torch.cat(pooled)


def _holds_all_tokens(store: ActivationStore, site: str) -> bool:
    try:
        store.positions(site, "all")
    except ModelError:
        return False
    return True
