import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ModelError
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.fidelity import MEAN, ORIGINAL, splice_in
from visae.evaluation.sections import spliced_rows
from visae.evaluation.tokens import EvaluatedTokens
from visae.images.source import ImageEntry, LoadedImage
from visae.models.config import ModelConfig
from visae.models.hooked import HookedModel
from visae.models.timm_models import timm_model
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import ReLU

N_IMAGES = 12
SITE = "residual@0"
CONFIG = EvaluateConfig(n_spliced_images=8, batch_size=3, n_resamples=1000)


class Noise:
    """Images of coloured noise."""

    location = "noise"
    entries = tuple(ImageEntry(ref=str(row)) for row in range(N_IMAGES))

    def load(self, ref: str) -> LoadedImage:
        rng = np.random.default_rng(int(ref))
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        return LoadedImage(content_id=f"noise-{ref}", pixels=Image.fromarray(pixels))


def tiny_model(seed: int) -> HookedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            depth=2,
            embed_dim=32,
            num_heads=2,
            num_classes=3,
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return timm_model(
        network.eval().requires_grad_(False),
        name="timm/tiny",
        title="Tiny",
        data_config={
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
    )


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return tiny_model(0)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> ActivationStore:
    folder: Path = tmp_path_factory.mktemp("store")
    config = RecordConfig(sites=(SITE,), tokens="all", dtype="float32", batch_size=4)
    return record(
        Noise(), model, folder, config=config, model_config=ModelConfig(model="timm/tiny")
    )


@pytest.fixture(scope="module")
def tokens(store) -> EvaluatedTokens:
    return EvaluatedTokens(store, SITE, "patches")


def identity_sae(scale: float = 1.0) -> SAE:
    """x̂ = scale · x, from one feature a direction and sign."""
    sae = SAE(SAEConfig(d_model=32, n_features=64, sparsity=ReLU()))
    with torch.no_grad():
        rows = torch.cat([torch.eye(32), -torch.eye(32)])
        sae.W_enc.copy_(rows * scale)
        sae.W_dec.copy_(rows)
    return sae


def first_logit(output, rows):
    """A task: the first logit, plus the row so that rows must be the right ones."""
    return output.logits[:, 0] + 10 * torch.tensor(rows)


def spliced(saes, tokens, model, **options):
    return splice_in(
        saes, tokens, model, Noise(), **{"score": first_logit, "config": CONFIG} | options
    )


def test_a_perfect_reconstruction_changes_nothing(tokens, model):
    found = spliced({"sae": identity_sae()}, tokens, model)
    assert found.rows == (0, 1, 3, 4, 6, 7, 9, 10)
    assert set(found.cosines) == {"cls", "patches"}
    for part in ("cls", "patches"):
        assert found.cosines[part]["sae"].min() > 1 - 1e-6
        assert found.cosines[part][MEAN].max() < 0.999
    torch.testing.assert_close(found.scores["sae"], found.scores[ORIGINAL], atol=1e-5, rtol=0)
    assert (found.scores[MEAN] - found.scores[ORIGINAL]).abs().max() > 0.01


def test_outcomes_are_those_of_the_network_run_by_hand(tokens, model):
    sae = identity_sae(0.5)
    found = spliced({"sae": sae}, tokens, model)
    pixels = model.preprocessing.pixels(
        [model.preprocessing.view(Noise().load(str(row)).pixels) for row in found.rows]
    )
    trace = model.trace(pixels, [SITE])
    for name, patches in {
        "sae": trace.tokens[SITE][:, 1:] * 0.5,
        MEAN: tokens.mean.float().expand(8, 16, 32),
    }.items():
        halved = torch.cat([trace.tokens[SITE][:, :1], patches], dim=1)
        output = model.resume(trace, SITE, halved)
        torch.testing.assert_close(
            found.scores[name].float(), first_logit(output, found.rows), atol=1e-4, rtol=1e-5
        )
        cls = torch.cosine_similarity(output.tokens[:, 0], trace.output.tokens[:, 0])
        torch.testing.assert_close(found.cosines["cls"][name].float(), cls, atol=1e-5, rtol=0)
        mean, original = (each[:, 1:].mean(1) for each in (output.tokens, trace.output.tokens))
        cosine = torch.cosine_similarity(mean, original)
        torch.testing.assert_close(
            found.cosines["patches"][name].float(), cosine, atol=1e-5, rtol=0
        )


def test_all_tokens_are_replaced_where_the_sae_reads_all(store, model):
    everything = EvaluatedTokens(store, SITE, "all")
    found = spliced({"sae": identity_sae()}, everything, model)
    # With every token the same in every image, so is the network's output.
    assert (found.scores[MEAN] - 10 * torch.tensor(found.rows)).std() < 1e-5


def test_the_score_kept_is_the_ratio_of_sums(tokens, model):
    found = spliced({"sae": identity_sae(0.7), "untrained": identity_sae(0.1)}, tokens, model)
    *_, row = spliced_rows(found, tokens, CONFIG)
    kept = {
        name: float(
            (found.scores[name] - found.scores[MEAN]).sum()
            / (found.scores[ORIGINAL] - found.scores[MEAN]).sum()
        )
        for name in ("sae", "untrained")
    }
    assert row.value.value == pytest.approx(kept["sae"])
    assert row.nulls["untrained"].value == pytest.approx(kept["untrained"])
    assert row.nulls[MEAN].value == 0
    assert row.value.interval is not None


def test_a_perfect_reconstruction_keeps_the_whole_score(tokens, model):
    rows = spliced_rows(spliced({"sae": identity_sae()}, tokens, model), tokens, CONFIG)
    values = {row.name: row.value.value for row in rows}
    assert values == pytest.approx(
        {"final_cls_cosine": 1, "final_patch_cosine": 1, "score_kept": 1}, abs=1e-4
    )


def test_without_a_task_or_a_model_the_rows_say_so(tokens, model):
    outcomes = spliced({"sae": identity_sae()}, tokens, model, score=None)
    assert outcomes.scores == {}
    *_, score = spliced_rows(outcomes, tokens, CONFIG)
    assert (score.value.value, score.value.note) == (None, "no task was given")
    for row in spliced_rows(None, tokens, CONFIG):
        assert row.value.value is None
        assert "model" in row.value.note


def test_a_model_without_cls_token_says_so(tokens, model):
    outcomes = spliced({"sae": identity_sae()}, tokens, model)
    alone = dataclasses.replace(outcomes, cosines={"patches": outcomes.cosines["patches"]})
    first, second, _ = spliced_rows(alone, tokens, CONFIG)
    assert "no cls" in first.value.note
    assert second.value.value is not None


def test_another_model_is_refused(tokens):
    with pytest.raises(ModelError, match="not those that were recorded"):
        spliced({"sae": identity_sae()}, tokens, tiny_model(1))


def test_progress_counts_images(tokens, model):
    told: list[int] = []
    spliced({"sae": identity_sae()}, tokens, model, on_images=told.append)
    assert told == [3, 6, 8]
