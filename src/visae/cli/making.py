"""The verbs that make things from images: ``record`` and ``train``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visae.cli.output import Screen
from visae.cli.slurm import LongVerb
from visae.errors import ConfigError

if TYPE_CHECKING:
    from visae.activations.format import RecordConfig
    from visae.activations.store import ActivationStore
    from visae.models.config import ModelConfig
    from visae.saes.config import ArchetypesConfig
    from visae.saes.learned import AnySparsity
    from visae.training.config import RunConfig, TrainConfig

__all__ = ["RecordCommand", "TrainCommand"]

_PASSES = 20


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
        screen.say(f"Next: visae train --store {self.out} --out {_beside(self.out, 'saes')}/first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(LongVerb):
    """Train sparse autoencoders on a store: an activation store → SAEs."""

    store: Path
    """Folder of the store."""
    out: Path
    """Folder of the SAE; with several seeds, -s0, -s1 … is added. Run again to resume."""
    site: str | None = None
    """Site, where the store has several."""
    target_site: str | None = None
    """Make a transcoder, which gives the activations at this site of the store."""
    kind: Literal["batch-topk", "topk", "jumprelu", "relu", "gated"] = "batch-topk"
    """Sparsity kind."""
    k: int = 32
    """Active features per token (batch-topk: on average; jumprelu: aimed at)."""
    l1: float = 0.01
    """Penalty of relu and gated."""
    decoder: Literal["free", "archetypal"] = "free"
    """archetypal: features are mixtures of cluster centres of the data, alike from seed to seed."""
    n_centroids: int = 2048
    """Cluster centres of an archetypal decoder."""
    n_features: int | None = None
    """Number of features, instead of expansion × width."""
    expansion: int = 8
    """Features per dimension of the activations."""
    matryoshka: bool = True
    """Nested prefixes of the features must reconstruct too."""
    random_prefixes: int = 0
    """So many nested prefixes drawn for each batch, instead of fixed ones."""
    orthogonality: float = 0.0
    """Weight of a penalty on features that point the same way."""
    seeds: tuple[int, ...] = (0,)
    """One SAE a seed, all from one pass over the data."""
    control: Literal[
        "none", "untrained", "frozen-decoder", "frozen-encoder", "random-activations"
    ] = "none"
    """Make a control instead: random directions, or random in one half only, or activations."""
    tokens: Literal["patches", "special", "all"] = "patches"
    """Which of the recorded tokens to train on."""
    n_tokens: int | None = None
    """Tokens to train on; without it, 20 passes over the store, at most 100 M."""
    batch_size: int = 4096
    """Tokens in a batch."""
    learning_rate: float | None = None
    """Peak learning rate; without it, chosen from the width and the length of the run."""
    auxk_alpha: float = 1 / 32
    """Weight of the dead features' loss; 0 turns it off."""
    data_seed: int = 0
    """Seed of the order of the tokens."""
    buffer_mb: int = 1024
    """Memory for mixing tokens, in MiB."""

    def run(self, screen: Screen) -> None:
        """Train, and say how it went."""
        from visae.activations.store import ActivationStore
        from visae.saes.checkpoint import read_sae_record
        from visae.training.loop import train

        store = ActivationStore(self.store)
        site = self.site or self._trainable_site(store.sites)
        runs = self._runs(store.site(site).d_model)
        config = self._config(store.n_tokens(site, self.tokens))
        train(store, site, runs, self.out.parent, config=config, progress=screen.progress)
        for run in runs:
            folder = self.out.parent / run.name
            metrics = read_sae_record(folder).metrics
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            screen.say(f"{folder}: {shown or run.control}")
        first = self.out.parent / runs[0].name
        screen.say(f"Next: visae evaluate --sae {first} --store {self.store}")

    def _trainable_site(self, sites: list[str]) -> str:
        others = [site for site in sites if site != self.target_site] or sites
        named = others if len(others) == 1 else [site for site in others if "@" in site]
        if len(named) == 1:
            return named[0]
        raise ConfigError(
            "This store has several sites",
            where=self.store,
            fix=f"Name one with --site: {', '.join(sites)}",
        )

    def _runs(self, d_model: int) -> "list[RunConfig]":
        from visae.training.config import RunConfig

        several = len(self.seeds) > 1
        return [
            RunConfig(
                name=f"{self.out.name}-s{seed}" if several else self.out.name,
                n_features=self.expansion * d_model if self.n_features is None else self.n_features,
                sparsity=self._sparsity(),
                matryoshka=self.matryoshka,
                random_prefixes=self.random_prefixes,
                archetypes=self._archetypes(),
                orthogonality=self.orthogonality,
                target_site=self.target_site,
                seed=seed,
                learning_rate=self.learning_rate,
                control=self.control,
            )
            for seed in self.seeds
        ]

    def _sparsity(self) -> "AnySparsity":
        from visae.saes.learned import Gated, JumpReLU
        from visae.saes.sparsity import BatchTopK, ReLU, TopK

        if self.kind == "jumprelu":
            return JumpReLU(target_l0=float(self.k))
        if self.kind in ("relu", "gated"):
            return ReLU(l1=self.l1) if self.kind == "relu" else Gated(l1=self.l1)
        return TopK(k=self.k) if self.kind == "topk" else BatchTopK(k=self.k)

    def _archetypes(self) -> "ArchetypesConfig | None":
        from visae.saes.config import ArchetypesConfig

        if self.decoder == "free":
            return None
        return ArchetypesConfig(n_centroids=self.n_centroids)

    def _config(self, n_stored: int) -> "TrainConfig":
        from visae.training.config import TrainConfig

        return TrainConfig(
            n_tokens=min(100_000_000, _PASSES * n_stored)
            if self.n_tokens is None
            else self.n_tokens,
            batch_size=self.batch_size,
            tokens=self.tokens,
            auxk_alpha=self.auxk_alpha,
            data_seed=self.data_seed,
            buffer_bytes=self.buffer_mb * 2**20,
        )


def _beside(folder: Path, stage: str) -> Path:
    """The folder of another stage in the same workspace."""
    return folder.parent.parent / stage if folder.parent.name == "activations" else folder.parent
