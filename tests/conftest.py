"""Shared set-up: no network, two threads, the same random examples on every run."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Read when torch, numpy and numba are first imported: sums come out the same on every machine.
for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "2"

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


@pytest.fixture(scope="session")
def make_vit():
    """Build a small random ViT; options are those of timm's ``VisionTransformer``."""

    def make(*, seed=0, **options):
        import torch
        from timm.models.vision_transformer import VisionTransformer

        from visae.models.timm_models import TimmModel

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
        return TimmModel(network, name="timm/tiny", title="Tiny", data_config=data_config)

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
