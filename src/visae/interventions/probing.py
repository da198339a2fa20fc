"""The linear probe of an experiment: its features from the store or the images, trained once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError, ModelError
from visae.images.source import ImageSource
from visae.interventions.batches import traced_images
from visae.interventions.division import learnable_classes
from visae.interventions.spec import LinearProbeConfig
from visae.interventions.tasks import FEWEST_IMAGES, LinearProbe, fit_linear_probe, pool_tokens
from visae.models.layout import Layout
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.storage.hashing import hash_json

__all__ = ["obtain_probe"]

_TOLERANCE = 0.02  # bfloat16 keeps 8 bits of an activation
_N_COMPARED = 4


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

    Classes with fewer than ``FEWEST_IMAGES`` of these images are left out.

    Raises:
        ExperimentError: when fewer than two classes are left, a saved probe is of another model,
            or the site named does not hold the model's final tokens.
    """
    classes = learnable_classes(store.images, rows)
    position = {name: index for index, name in enumerate(classes)}
    labels = store.images.labels
    used = [row for row in rows if labels[row] in position]
    digest = hash_json([[store.images.content_ids[row], labels[row]] for row in used])
    if (folder / "probe.json").is_file():
        probe = LinearProbe.load(folder)
        probe.require_model(model.identity)
        if probe.image_ids_digest == digest and probe.pool == config.pool:
            return probe
    if len(classes) < 2:
        raise ExperimentError(
            f"A probe needs two classes with {FEWEST_IMAGES} discovery images or more; there "
            f"{'is' if len(classes) == 1 else 'are'} {len(classes)}",
            where="labels",
            fix="Give images with labels: class subfolders, or a manifest with a label column",
        )
    finals = _FinalTokens(config, store, model, source)
    probe = fit_linear_probe(
        finals.pooled(used, progress),
        torch.tensor([position[labels[row] or ""] for row in used]),
        classes=classes,
        model=model.identity,
        layout=finals.layout,
        pool=config.pool,
        image_ids_digest=digest,
    )
    probe.save(folder)
    return probe


class _FinalTokens(NamedTuple):
    """Where the pooled final tokens of a store's images come from."""

    config: LinearProbeConfig
    store: ActivationStore
    model: VisionModel
    source: ImageSource

    @property
    def layout(self) -> Layout:
        """Layout of the final tokens: that of the last site, nearest to them."""
        return self.model.layout([*self.store.sites, *self.model.sites][-1])

    def pooled(
        self, rows: Sequence[int], progress: ProgressCallback
    ) -> Float[Tensor, "image d_out"]:
        """Read from the store where it holds them, else computed."""
        site = self.config.site
        if site not in self.store.sites or not _holds_all_tokens(self.store, site):
            return self._computed(rows, progress)
        found, some = self._stored(rows), rows[:_N_COMPARED]
        _check_final(site, found[: len(some)], self._computed(some, silent))
        return found

    def _stored(self, rows: Sequence[int]) -> Float[Tensor, "image d_out"]:
        site, wanted = self.config.site, torch.tensor(rows)
        found: dict[int, Tensor] = {}
        for shard in self.store.shards(site, "all"):
            within = wanted - shard.first_image
            within = within[(within >= 0) & (within < shard.activations.shape[0])]
            tokens = shard.activations[within].float()
            pooled = pool_tokens(tokens, self.config.pool, self.store.site(site).layout)
            found |= dict(zip((within + shard.first_image).tolist(), pooled, strict=True))
        return torch.stack([found[row] for row in rows])

    def _computed(
        self, rows: Sequence[int], progress: ProgressCallback
    ) -> Float[Tensor, "image d_out"]:
        site, parts = self.store.sites[0], []
        done = 0
        for batch in traced_images(self.store, self.source, self.model, site, rows, batch_size=32):
            tokens = batch.trace.output.tokens
            parts.append(pool_tokens(tokens, self.config.pool, self.layout).cpu())
            done += len(batch.rows)
            progress(Progress(stage="probe", done=done, total=len(rows), unit="images"))
        return torch.cat(parts)


def _check_final(
    site: str,
    stored: Float[Tensor, "image d_site"],
    computed: Float[Tensor, "image d_out"],
) -> None:
    """A probe that learned from another site's tokens would read the final ones wrongly."""
    same = stored.shape == computed.shape
    if not same or float((stored - computed).norm()) > _TOLERANCE * float(computed.norm()):
        raise ExperimentError(
            f"The recorded site {site} does not hold the model's final tokens",
            where="task.site",
            fix="Name the site of the model's last norm; leave it out to have them computed",
        )


def _holds_all_tokens(store: ActivationStore, site: str) -> bool:
    try:
        store.positions(site, "all")
    except ModelError:
        return False
    return True
