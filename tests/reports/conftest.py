"""A small index whose heat maps are known, on views wider than high."""

import pytest
import torch

N_IMAGES = 24
CLASSES = ('<b>"cat" & co</b>', "dog")


def planted_tokens():
    """Four features: at patch i % 8 of image i with i + 1, never, everywhere, on two images."""
    tokens = torch.full((N_IMAGES, 8, 4), -1.0)
    rows = torch.arange(N_IMAGES)
    tokens[rows, rows % 8, 0] = rows + 1.0
    tokens[:, :, 2] = 1.0 + rows[:, None] / 100
    tokens[[4, 5], 3, 3] = 2.0
    return tokens


@pytest.fixture(scope="session")
def build(tmp_path_factory, table_model, numbered_images):
    """Build the index of an SAE whose feature i is dimension i; options of ``IndexConfig``."""
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.features.build import build_index
    from visae.features.config import IndexConfig
    from visae.models.config import ModelConfig
    from visae.models.preprocessing import Preprocessing
    from visae.saes.checkpoint import Provenance, save_sae
    from visae.saes.config import SAEConfig
    from visae.saes.sae import SAE
    from visae.saes.sparsity import ReLU

    root = tmp_path_factory.mktemp("reports")
    model = table_model({"residual@0": planted_tokens()}, grid=(2, 4))
    model.preprocessing = Preprocessing(
        size=(20, 40), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    source = numbered_images(N_IMAGES, labels=[CLASSES[i % 2] for i in range(N_IMAGES)])
    config = RecordConfig(sites=("residual@0",), dtype="float32")
    model_config = ModelConfig(model="test/table")
    store = record(source, model, root / "store", config=config, model_config=model_config)

    sae = SAE(SAEConfig(d_model=4, n_features=4, sparsity=ReLU()))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    origin = {"tokens": "patches", "n_tokens": 0, "seed": 0, "control": "none", "recipe": {}}
    provenance = Provenance.of_store(store, "residual@0", **origin)
    folder = root / "a&b"
    save_sae(sae, folder, provenance=provenance, reference=torch.eye(4), metrics={})

    def make(name, **options):
        config = IndexConfig(**options)
        return build_index(folder, store, root / name, config=config, images=source)

    return make


@pytest.fixture(scope="session")
def index(build):
    """The index of all images; do not change it."""
    return build("index")
