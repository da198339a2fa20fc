"""Recordings of given activations, and what is in a store's folder."""

import pytest

SPECIAL = ("cls", "register0")


@pytest.fixture(scope="session")
def tables():
    """Make random activations of two sites with two special tokens, 5 and 3 wide."""
    import torch

    def make(n_images, *, grid=(2, 3), seed=0):
        generator = torch.Generator().manual_seed(seed)
        n_tokens = len(SPECIAL) + grid[0] * grid[1]
        return {
            "residual@3": torch.randn(n_images, n_tokens, 5, generator=generator),
            "mlp@1": torch.randn(n_images, n_tokens, 3, generator=generator),
        }

    return make


@pytest.fixture(scope="session")
def run(tables, numbered_images, table_model):
    """Record 50 images (or those of given tables) in shards of 16."""
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.models.config import ModelConfig

    def run_record(out, *, given=None, model=None, source=None, options=None, **config):
        made = tables(50) if given is None else given
        n_images = len(next(iter(made.values())))
        defaults = {"sites": tuple(made), "tokens": "all", "dtype": "float32", "batch_size": 7}
        return record(
            source or numbered_images(n_images),
            model or table_model(made, special=SPECIAL, grid=(2, 3)),
            out,
            config=RecordConfig(**{**defaults, "shard_bytes": 1, **config}),
            model_config=ModelConfig(model="test/table"),
            **(options or {}),
        )

    return run_record


@pytest.fixture(scope="session")
def everything():
    """All activations of a site of a store."""
    import torch

    return lambda store, site: torch.cat([shard.activations for shard in store.shards(site)])


@pytest.fixture(scope="session")
def files():
    """The bytes of every file of a folder but the lock."""
    return lambda folder: {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="session")
def stop_after():
    """Options that press Ctrl-C after some images."""

    def make(n_images):
        def progress(told):
            if told.done > n_images:
                raise KeyboardInterrupt

        return {"progress": progress}

    return make
