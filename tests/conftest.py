"""Shared set-up: no network, two threads, the same random examples on every run."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; needs no GPU

# Read when torch, numpy and numba are first imported: sums come out the same on every machine.
for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # busy threads wait at great cost where cores are shared

settings.register_profile("visae", deadline=None, derandomize=True)
settings.load_profile("visae")


# Tiny models, images and stores for every layer above `images`


class NumberedImages:
    """An image source without files: image i is one pixel that says i."""

    location = "numbered:"

    def __init__(self, n_images, *, labels=None, groups=None, unreadable=()):
        from visae.images.source import ImageEntry

        self.unreadable = set(unreadable)
        self.entries = tuple(
            ImageEntry(
                ref=str(i),
                label=None if labels is None else labels[i],
                group=None if groups is None else groups[i],
            )
            for i in range(n_images)
        )

    def load(self, ref):
        from PIL import Image

        from visae.errors import ImageError
        from visae.images.source import LoadedImage

        if int(ref) in self.unreadable:
            raise ImageError(f"Image {ref} is broken", where=ref)
        colour = int(ref) // 256, int(ref) % 256, 0
        return LoadedImage(f"{int(ref):064x}", Image.new("RGB", (1, 1), colour))


class TableModel:
    """A model that looks the tokens of ``NumberedImages`` up in tables, one a site."""

    def __init__(self, tables, *, special=(), grid=None, weights="0" * 64):
        from visae.models.config import ModelIdentity
        from visae.models.preprocessing import Preprocessing

        self.tables, self.special, self.grid = tables, special, grid
        self.sites = tuple(tables)
        self.identity = ModelIdentity(name="test/table", title="table", weights_sha256=weights)
        self.preprocessing = Preprocessing(
            size=(1, 1), interpolation="nearest", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )

    def layout(self, site):
        from visae.models.layout import Layout

        n_patches = self.tables[site].shape[1] - len(self.special)
        return Layout(special=self.special, grid=self.grid or (1, n_patches))

    def d_model(self, site):
        return self.tables[site].shape[2]

    def tokens(self, pixels, sites):
        return self.trace(pixels, sites).tokens

    def trace(self, pixels, sites):
        from visae.models.protocol import Output, Trace

        numbers = (pixels[:, :2, 0, 0] * 255).round().long()
        rows = numbers[:, 0] * 256 + numbers[:, 1]
        tokens = {site: self.tables[site][rows] for site in sites}
        return Trace(tokens, dict.fromkeys(sites, pixels), Output(tokens[sites[0]], None))

    def resume(self, trace, site, tokens):
        from visae.models.protocol import Output

        return Output(tokens, None)


@pytest.fixture(scope="session")
def numbered_images():
    """The class of image sources without files."""
    return NumberedImages


@pytest.fixture(scope="session")
def table_model():
    """The class of models whose activations are given."""
    return TableModel


@pytest.fixture(scope="session")
def store_of():
    """Record given activations (image, token, d_model), one table a site, in a folder."""

    def make(folder, tables, *, special=(), grid=None, labels=None, groups=None, **config):
        from visae.activations.format import RecordConfig
        from visae.activations.record import record
        from visae.models.config import ModelConfig

        n_images = len(next(iter(tables.values())))
        return record(
            NumberedImages(n_images, labels=labels, groups=groups),
            TableModel(tables, special=special, grid=grid),
            folder,
            config=RecordConfig(sites=tuple(tables), **{"dtype": "float32"} | config),
            model_config=ModelConfig(model="test/table"),
        )

    return make


# A model hub


@pytest.fixture
def model_hub(monkeypatch, tmp_path):
    """A model hub on this machine that the hub client talks to, with an empty cache.

    Its owner is logged in; see ``hub_stand_in.py`` for what it holds.
    """
    import importlib.util
    from pathlib import Path

    from huggingface_hub import constants

    path = Path(__file__).with_name("hub_stand_in.py")
    stand_in = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("hub_stand_in", path)
    )
    stand_in.__spec__.loader.exec_module(stand_in)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setenv("HF_TOKEN", stand_in.OWNER_TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with stand_in.running_hub() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


# Several processes, as torchrun starts them


HEAD_OF_RANK = """
import contextlib, os
from visae.distributed import joined_ranks

os.environ.update({environment!r})
with open({out!r}, "w") as out, contextlib.redirect_stdout(out), joined_ranks() as ranks:
"""


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """What each of some processes prints, running a body that knows its ``ranks``.

    They are forked from one process that has the imports behind it.
    """
    import multiprocessing
    import socket

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["visae.activations.record", "torch.distributed"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def run(body, *, n_processes=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("ranks")
        processes = []
        for rank in range(n_processes):
            values = (rank, n_processes, rank, n_processes, "127.0.0.1", port)
            environment = dict(zip(names, map(str, values), strict=True))
            code = HEAD_OF_RANK.format(environment=environment, out=str(folder / str(rank)))
            code += "\n".join(f"    {line}" for line in body.strip().splitlines())
            processes.append(context.Process(target=exec, args=(code, {})))
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * n_processes
        return [(folder / str(rank)).read_text() for rank in range(n_processes)]

    return run


@pytest.fixture(scope="session")
def make_vit():
    """Build a small random ViT; options are those of timm's ``VisionTransformer``."""

    def make(*, seed=0, **options):
        import torch
        from timm.models.vision_transformer import VisionTransformer

        from visae.models.timm_models import timm_model

        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = VisionTransformer(**shape | {"num_classes": 5, "init_values": 0.5} | options)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        size = network.patch_embed.img_size
        mean_and_std = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
        crop = {"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
        data_config = {"input_size": (3, *size), **crop, **mean_and_std}
        return timm_model(network, name="timm/tiny", title="Tiny", data_config=data_config)

    return make


@pytest.fixture(scope="session")
def tiny_vit(make_vit):
    """A ViT of 3 blocks, width 32 and 4 × 4 patches, with a class token and two registers."""
    return make_vit(reg_tokens=2)


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    """20 images in two classes, told apart by a red or blue square at a random place."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("planted")
    for i in range(20):
        generator = np.random.default_rng(i)
        pixels = generator.integers(90, 150, (36, 40, 3), dtype=np.uint8)
        row, column = generator.integers(0, (28, 32))
        pixels[row : row + 8, column : column + 8] = (230, 20, 20) if i % 2 else (20, 20, 230)
        path = root / ("red" if i % 2 else "blue") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory, planted_folder, tiny_vit):
    """The planted images recorded at two sites of the tiny ViT, all tokens; do not change it."""
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.images.opening import open_images
    from visae.models.config import ModelConfig

    return record(
        open_images(planted_folder),
        tiny_vit,
        tmp_path_factory.mktemp("stores") / "planted",
        config=RecordConfig(sites=("residual@1", "mlp@2"), tokens="all", batch_size=8),
        model_config=ModelConfig(model="timm/tiny"),
    )


# A planted concept: a red or blue patch decides the class, and an SAE built by hand knows both


class PlantedLab:
    """Images, model, store and SAE of which the truth is known.

    Feature 0 is the red patch and feature 1 the blue one; features 2 to 22 fire on a fifth of the
    patches along random directions across those two; feature 23 never fires.
    """

    n_features = 24
    dead = 23

    def __init__(self, folder, *, n_images=80, labels=None, groups=None):
        self.folder = folder
        self.images = folder / "images.csv"
        self.is_red = [i % 2 == 1 for i in range(n_images)]
        self._write_images(labels or ["red" if red else "blue" for red in self.is_red], groups)
        self.model = self._model()
        self.store = self._record()
        self.sae_dir = folder / "saes" / "hand"
        self.sae = self._sae()
        self._save_sae()

    def spec(self, **changes):
        """A small experiment: ablating the best red feature lowers P(red)."""
        from visae.interventions import spec as parts
        from visae.interventions.verdict import Prediction

        doses = parts.DosesConfig(suppression=(-1.0, 0.5, 1.0), insertion=(0.0, 1.0, 2.0))
        settings = {
            "name": "red",
            "hypothesis": "Ablating the feature that best marks red lowers P(red)",
            "sae": self.sae_dir,
            "store": self.store.folder,
            "task": parts.LinearProbeConfig(pool="mean-patch"),
            "selection": parts.BestForClass(class_name="red"),
            "outcome": parts.OutcomeConfig(class_name="red", n_per_other_class=8),
            "prediction": Prediction(direction="decrease", smallest_effect=0.02),
            "controls": parts.ControlsConfig(n_random=39, n_matched=20),
            "doses": doses,
            "statistics": parts.StatisticsConfig(n_resamples=1000, n_permutations=199),
        }
        return parts.ExperimentSpec(**settings | changes)

    def run(self, name, spec=None, **options):
        """The result of an experiment in a folder of its own."""
        from visae.interventions.experiment import run_experiment

        out, spec = self.folder / "experiments" / name, spec or self.spec()
        options = {"probe_dir": self.folder / "probes" / spec.task.pool} | options
        return run_experiment(spec, out, model=self.model, **options)

    def _write_images(self, labels, groups):
        import csv

        import numpy as np
        from PIL import Image

        generator = np.random.default_rng(0)
        rows = [("path", "label", "group")]
        for i, red in enumerate(self.is_red):
            pixels = generator.integers(90, 150, (16, 16, 3), dtype=np.uint8)
            row, column = 4 * generator.integers(0, 4, 2)
            pixels[row : row + 4, column : column + 4] = (230, 20, 20) if red else (20, 20, 230)
            path = self.folder / "pictures" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            rows.append((f"pictures/{i:03d}.png", labels[i], groups[i] if groups else ""))
        with self.images.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    @staticmethod
    def _model():
        import torch
        from timm.models.vision_transformer import VisionTransformer

        from visae.models.timm_models import timm_model

        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = VisionTransformer(
                img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0
            )
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        data_config = {
            "input_size": (3, 16, 16),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.2, 0.2, 0.2),
        }
        return timm_model(network, name="timm/planted", title="Planted", data_config=data_config)

    def _record(self):
        from visae.activations.format import RecordConfig
        from visae.activations.record import record
        from visae.images.opening import open_images
        from visae.models.config import ModelConfig

        return record(
            open_images(str(self.images)),
            self.model,
            self.folder / "activations" / "planted",
            config=RecordConfig(sites=("residual@0", "norm"), tokens="all", dtype="float32"),
            model_config=ModelConfig(model="timm/planted"),
        )

    def patch_colours(self):
        """(red, blue): which patches (image, patch) are planted."""
        import numpy as np
        import torch

        source = self.store.source()
        found = []
        for entry in source.entries:
            pixels = np.asarray(source.load(entry.ref).pixels, dtype=np.float64)
            means = pixels.reshape(4, 4, 4, 4, 3).mean((1, 3))
            found.append((means[..., 0] - means[..., 2]).reshape(16))
        excess = torch.tensor(np.stack(found))
        return excess > 100, excess < -100

    def _sae(self):
        import torch

        from visae.saes.config import SAEConfig
        from visae.saes.sae import SAE
        from visae.saes.sparsity import BatchTopK

        x = torch.cat([s.activations for s in self.store.shards("residual@0", "patches")])
        x = x.flatten(0, 1)
        sae = SAE(SAEConfig(d_model=16, n_features=self.n_features, sparsity=BatchTopK(k=4)))
        z = (x - x.mean(0)) / x.std()
        planted = [colour.flatten() for colour in self.patch_colours()]
        means = torch.stack([z[p].mean(0) - z[~p].mean(0) for p in planted])
        across = torch.eye(16) - torch.linalg.pinv(means) @ means
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(self.n_features, 16, generator=generator) @ across
        rows[:2] = means
        rows = torch.nn.functional.normalize(rows, dim=1)
        along = z @ rows.T
        edge = along.quantile(0.8, dim=0)
        edge[:2] = torch.stack(
            [(along[p, i].min() + along[~p, i].max()) / 2 for i, p in enumerate(planted)]
        )
        edge[self.dead] = 1e6
        with torch.no_grad():
            sae.mean.copy_(x.mean(0))
            sae.scale.copy_(x.std())
            sae.W_enc.copy_(rows / edge[:, None])
            sae.W_dec.copy_(rows * edge[:, None])
            sae.threshold.fill_(1.0)
        return sae.requires_grad_(False).eval()

    def _save_sae(self):
        from visae.saes.checkpoint import Provenance, save_sae

        provenance = Provenance.of_store(
            self.store,
            "residual@0",
            tokens="patches",
            n_tokens=0,
            seed=0,
            control="none",
            recipe={"made": "by hand"},
        )
        reference = self.store.shard("residual@0", 0, "patches").activations.flatten(0, 1)
        save_sae(self.sae, self.sae_dir, provenance=provenance, reference=reference, metrics={})


@pytest.fixture(scope="session")
def make_planted_lab():
    """Make a planted lab of one's own in a folder, to change or with other labels or groups."""
    return PlantedLab


@pytest.fixture(scope="session")
def planted_lab(tmp_path_factory):
    """The planted lab that tests share; its store and SAE are not to be changed."""
    return PlantedLab(tmp_path_factory.mktemp("lab"))
