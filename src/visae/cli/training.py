"""The verb ``train``: an activation store, or images and a model that runs on them → SAEs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visae.cli.loop_options import LoopOptions
from visae.cli.output import Screen
from visae.cli.slurm import LongVerb
from visae.cli.token_options import FilterOptions, LiveOptions
from visae.errors import ConfigError

if TYPE_CHECKING:
    from visae.activations.stream import TokenStream
    from visae.distributed import Ranks
    from visae.training.config import RunConfig, TrainConfig
    from visae.training.sweep_config import RunSettings, SweepConfig
    from visae.training.sweep_results import SweepResult

__all__ = ["TrainCommand"]

_PASSES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(LongVerb):
    """Train sparse autoencoders: an activation store, or images and a model → SAEs."""

    out: Path
    """Folder of the SAE; with several seeds, -s0, -s1 … is added; of a sweep, the folder that its
    SAEs and their table go to. Run again to resume."""
    store: Path | None = None
    """Folder of the store; of saev, a folder of shards."""
    live: LiveOptions = dataclasses.field(default_factory=LiveOptions)
    """Instead of a store, images and a model that runs on them: nothing is written but the SAE."""
    site: str | None = None
    """Site, where there are several."""
    target_site: str | None = None
    """Make a transcoder, which gives the activations at this site."""
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
    """Which tokens of each image to train on."""
    where: FilterOptions = dataclasses.field(default_factory=FilterOptions)
    """Which of a store's tokens to train on."""
    n_tokens: int | None = None
    """Tokens to train on; without it, 20 passes over all, at most 100 M."""
    batch_size: int = 4096
    """Tokens in a batch."""
    learning_rate: float | None = None
    """Peak learning rate; without it, chosen from the width and the length of the run."""
    auxk_alpha: float = 1 / 32
    """Weight of the dead features' loss; 0 turns it off."""
    data_seed: int = 0
    """Seed of the order of the tokens."""
    buffer_mb: int | None = None
    """Memory for mixing tokens, in MiB; without it, what the batch size needs, 1 to 4 GiB."""
    sweep: Path | None = None
    """TOML file with settings that vary: many SAEs from one pass; other options hold for all."""
    memory_gb: float | None = None
    """Memory for the SAEs of a sweep, instead of most of what is free; more are trained later."""
    loop: LoopOptions = dataclasses.field(default_factory=LoopOptions)
    """How training goes."""

    def run(self, screen: Screen) -> None:
        """Train, and say how it went; of several processes, the first one says it."""
        from visae.distributed import joined_ranks
        from visae.training.loop import train_on

        if self.sweep is not None:
            self._run_sweep(self.sweep, screen)
            return
        with joined_ranks() as ranks:
            stream, config = self._stream(ranks, [self._settings()])
            runs = self._runs(stream)
            out = self.out.parent
            train_on(stream, runs, out, config=config, progress=screen.progress, ranks=ranks)
        if ranks.is_first:
            self._say(runs, screen)

    def _run_sweep(self, path: Path, screen: Screen) -> None:
        """Train the SAEs of a sweep, and show its table and figure."""
        from visae.distributed import joined_ranks
        from visae.training.sweep import train_sweep
        from visae.training.sweep_config import read_sweep

        sweep = read_sweep(path)
        plan = list(sweep.settings(self._settings(), where=path).values())
        with joined_ranks() as ranks:
            stream, config = self._stream(ranks, plan)
            result = train_sweep(
                stream,
                self._runs_of(sweep, stream),
                self.out,
                config=config,
                rule=sweep.choice,
                memory_bytes=None if self.memory_gb is None else round(self.memory_gb * 1e9),
                progress=screen.progress,
                ranks=ranks,
            )
        if ranks.is_first:
            self._show(result, screen)

    def _show(self, result: "SweepResult", screen: Screen) -> None:
        from visae.reports.sweep_figure import write_sweep_figure

        screen.say(result.table())
        screen.say(f"*: {result.rule_text}; +: none has less NMSE at no larger L0")
        for choice in result.choices:
            screen.say(f"Chosen at {choice.sites}: {choice.chosen or 'none is within the bounds'}")
        files = [self.out / name for name in ("results.csv", "results.parquet")]
        if any(row.candidate for row in result.rows):
            files += write_sweep_figure(result, self.out)
        screen.say(f"Table and figure: {', '.join(map(str, files))}")
        names = [choice.chosen for choice in result.choices] + [result.rows[0].name]
        screen.say(self._next(self.out / next(name for name in names if name is not None)))

    def _say(self, runs: "list[RunConfig]", screen: Screen) -> None:
        from visae.saes.checkpoint import read_sae_record

        for run in runs:
            folder = self.out.parent / run.name
            metrics = read_sae_record(folder).metrics
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            screen.say(f"{folder}: {shown or run.control}")
        screen.say(self._next(self.out.parent / runs[0].name))

    def _next(self, sae: Path) -> str:
        if self.store is not None:
            return f"Next: visae evaluate --sae {sae} --store {self.store}"
        site = "" if self.site is None else f" --site {self.site}"
        return f"Next: visae record {self.live.words()}{site} --out DIR, and evaluate {sae} on it"

    def _stream(
        self, ranks: "Ranks", plan: "list[RunSettings]"
    ) -> "tuple[TokenStream, TrainConfig]":
        if self.store is not None:
            return self._stored_stream(plan)
        return self._live_stream(plan, ranks.device(self.loop.device))

    def _stored_stream(self, plan: "list[RunSettings]") -> "tuple[TokenStream, TrainConfig]":
        from visae.activations.loaders import ShuffledTokens
        from visae.activations.opening import open_store
        from visae.activations.selection import select

        self.live.require_none()
        store = open_store(self.store or Path())
        sites, where = self._sites(plan, list(store.sites)), self.where.token_filter()
        n_tokens = select(store, sites[0], tokens=self.tokens, where=where).n_tokens
        config = self._config(n_tokens)
        stream = ShuffledTokens(
            store,
            *sites,
            tokens=config.tokens,
            where=where,
            batch_size=config.batch_size,
            buffer_bytes=config.buffer_bytes,
            seed=config.data_seed,
        )
        return stream, config

    def _live_stream(
        self, plan: "list[RunSettings]", device: str
    ) -> "tuple[TokenStream, TrainConfig]":
        from visae.activations.live import LiveTokens

        self.where.require_none()
        source, model = self.live.open(device=device)
        sites = self._sites(plan, list(model.sites))
        config = self._config(len(source.entries) * model.layout(sites[0]).n_kept(self.tokens))
        stream = LiveTokens(
            source,
            model,
            *sites,
            tokens=config.tokens,
            batch_size=config.batch_size,
            buffer_bytes=config.buffer_bytes,
            seed=config.data_seed,
            images_per_forward=self.live.images_per_forward,
            workers=self.live.workers,
        )
        return stream, config

    def _sites(self, plan: "list[RunSettings]", known: list[str]) -> list[str]:
        """Every site that is read or given, the one of SAEs that name none first."""
        named = [site for one in plan for site in (one.site, one.target_site) if site is not None]
        unnamed = any(one.site is None for one in plan)
        return list(dict.fromkeys([self._trainable_site(known), *named] if unnamed else named))

    def _trainable_site(self, sites: list[str]) -> str:
        others = [site for site in sites if site != self.target_site] or sites
        named = others if len(others) == 1 else [site for site in others if "@" in site]
        if len(named) == 1:
            return named[0]
        raise ConfigError(
            "There are several sites to train on",
            where=self.store or self.live.model,
            fix=f"Name one with --site: {', '.join(sites)}",
        )

    def _settings(self) -> "RunSettings":
        """The options as the settings of an SAE."""
        from visae.training.sweep_config import RunSettings

        if self.sweep is not None and self.seeds != (0,):
            raise ConfigError(
                "The seeds of a sweep stand in its file",
                where="--seeds",
                fix=f"Write for example seed = [0, 1, 2] below [grid] in {self.sweep}",
            )
        names = {field.name for field in dataclasses.fields(RunSettings)}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return RunSettings(**given)

    def _runs(self, stream: "TokenStream") -> "list[RunConfig]":
        """One SAE a seed."""
        settings = dataclasses.replace(self._settings(), site=stream.sites[0])
        several, d_model = len(self.seeds) > 1, stream.d_model(stream.sites[0])
        return [
            dataclasses.replace(settings, seed=seed).run(
                f"{self.out.name}-s{seed}" if several else self.out.name, d_model
            )
            for seed in self.seeds
        ]

    def _runs_of(self, sweep: "SweepConfig", stream: "TokenStream") -> "list[RunConfig]":
        base = dataclasses.replace(self._settings(), site=self.site or stream.sites[0])
        return sweep.runs(
            base, lambda one: stream.d_model(one.site or base.site or ""), where=self.sweep
        )

    def _config(self, n_stored: int) -> "TrainConfig":
        from visae.training.config import TrainConfig

        config = TrainConfig(
            n_tokens=min(100_000_000, _PASSES * n_stored)
            if self.n_tokens is None
            else self.n_tokens,
            batch_size=self.batch_size,
            tokens=self.tokens,
            where=self.where.token_filter(),
            auxk_alpha=self.auxk_alpha,
            data_seed=self.data_seed,
            buffer_bytes=None if self.buffer_mb is None else self.buffer_mb * 2**20,
        )
        return self.loop.added_to(config)
