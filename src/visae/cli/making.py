"""The verb ``record``: images → an activation store."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visae.cli.output import Screen
from visae.cli.slurm import LongVerb

if TYPE_CHECKING:
    from visae.activations.format import RecordConfig
    from visae.activations.store import ActivationStore
    from visae.models.config import ModelConfig

__all__ = ["RecordCommand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordCommand(LongVerb):
    """Record a model's activations on images: images → an activation store."""

    images: str
    """Folder (class subfolders give labels), .csv or .parquet manifest, hf://owner/dataset …"""
    model: str
    """timm model name such as vit_small_patch14_dinov2.lvd142m, open_clip/…, transformers/…"""
    out: Path
    """Folder of the store; run again to resume."""
    site: tuple[str, ...] = ("residual@9",)
    """Where: residual@N, mlp@N, attention@N, heads@N or a module path; several in one pass."""
    weights: Path | None = None
    """Local safetensors file with the model's own tensor names, instead of the hub."""
    revision: str | None = None
    """Commit, tag or branch of the hub's repository, instead of the newest."""
    image_size: int | None = None
    """Side of the square input in pixels, instead of the model's own."""
    title: str | None = None
    """What to call the model in figures and reports."""
    tokens: Literal["patches", "special", "all"] = "all"
    """Which tokens to keep; all lets probes read the CLS token later."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the stored activations."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format in which the model computes; bfloat16 is fast on a GPU."""
    batch_size: int = 32
    """Images in one forward pass."""
    workers: int | None = None
    """Processes that read images; 0 reads them in this one, and so does a model on the CPU."""
    shard_mb: int = 64
    """Target size of a shard file in MiB; a shard is the unit of resuming."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …"""
    strict: bool = False
    """Stop at the first image that cannot be read instead of listing it in skipped.csv."""

    def run(self, screen: Screen) -> None:
        """Record, and say what was recorded; of several processes, the first one says it."""
        from visae.activations.record import record
        from visae.distributed import joined_ranks
        from visae.images.opening import open_images
        from visae.models.loading import load_model

        model_config = self._model_config()
        source = open_images(self.images)
        with joined_ranks() as ranks:
            store = record(
                source,
                load_model(model_config, device=ranks.device(self.device)),
                self.out,
                config=self._config(),
                model_config=model_config,
                strict=self.strict,
                progress=screen.progress,
                ranks=ranks,
            )
        if ranks.is_first:
            self._say(store, len(source.entries), screen)

    def _config(self) -> "RecordConfig":
        from visae.activations.format import RecordConfig

        return RecordConfig(
            sites=self.site,
            tokens=self.tokens,
            dtype=self.dtype,
            precision=self.precision,
            batch_size=self.batch_size,
            shard_bytes=self.shard_mb * 2**20,
            workers=self.workers,
        )

    def _model_config(self) -> "ModelConfig":
        from visae.models.config import ModelConfig

        return ModelConfig(
            model=self.model,
            weights=self.weights,
            revision=self.revision,
            image_size=self.image_size,
            title=self.title,
        )

    def _say(self, store: "ActivationStore", n_listed: int, screen: Screen) -> None:
        screen.say(f"Recorded {store.n_images:,} images at {', '.join(store.sites)}: {self.out}")
        if n_skipped := n_listed - store.n_images:
            screen.say(f"{n_skipped} images were skipped: see {self.out / 'skipped.csv'}")
        if repeated := store.images.duplicates():
            screen.say(f"{len(repeated)} images occur more than once.")
        site = f" --site {store.sites[0]}" if len(store.sites) > 1 else ""
        saes = _beside(self.out, "saes")
        screen.say(f"Next: visae train --store {self.out}{site} --out {saes}/first")


def _beside(folder: Path, stage: str) -> Path:
    """The folder of another stage in the same workspace."""
    return folder.parent.parent / stage if folder.parent.name == "activations" else folder.parent
