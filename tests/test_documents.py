"""The README and the documents tell the truth: every Python block in them is run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.models.config import ModelConfig
from visae.models.protocol import VisionModel
from visae.saes.checkpoint import load_sae
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

ROOT = Path(__file__).parents[1]


def blocks(path: Path, language: str = "python") -> list[str]:
    """The blocks of a language in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def swap(code: str, *pairs: tuple[str, str]) -> str:
    """Replace parts of a document's code, each of which must be there."""
    for old, new in pairs:
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.mark.slow
def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As printed, with a tiny local model and a short training in place of the hub's."""
    import timm

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    save_file(network.state_dict(), "tiny.safetensors")
    generator = np.random.default_rng(0)
    for name, colour in (("dog", 20), ("cat", 80)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(30):
            blocks_of_colour = generator.integers(0, 56, (8, 8, 3), dtype=np.uint8) * 3
            pixels = np.kron(blocks_of_colour, np.ones((8, 8, 1), np.uint8)) + np.uint8(colour)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    (spec,) = blocks(ROOT / "README.md", "toml")
    (tmp_path / "dogs.toml").write_text(spec, encoding="utf-8")
    (code,) = blocks(ROOT / "README.md")
    assert len(code.splitlines()) <= 20
    hub = 'model="vit_small_patch14_dinov2.lvd142m", image_size=224'
    tiny = 'model="vit_tiny_patch16_224", weights=Path("tiny.safetensors"), image_size=64'
    code = swap(
        code,
        (hub, tiny),
        ("n_features=3072", "n_features=128"),
        ("2_000_000", "40_000"),
        ("n_tokens=40_000", "n_tokens=40_000, batch_size=256"),
        ("k=32", "k=8"),
    )
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    said = capsys.readouterr().out
    assert re.match(r"(Supported|Refuted|Inconclusive): ", said)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_extension_point_works_as_documented(tmp_path: Path) -> None:
    *definitions, use_code = blocks(ROOT / "docs/extending.md")
    names: dict[str, Any] = {}
    for code in definitions:
        exec(compile(code, "extending.md", "exec"), names)  # noqa: S102
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    source = names["Frames"](frames, ["even", "odd"] * 12, [f"plate{i // 6}" for i in range(24)])
    model = names["SmallCNN"]()
    assert isinstance(model, VisionModel)
    store = record(
        source,
        model,
        tmp_path / "activations" / "frames",
        config=RecordConfig(sites=("early",), dtype="float32"),
        model_config=ModelConfig(model="mine/small-cnn"),
    )
    for made in (model, names["plain_cnn"](), names["token_mixer"]()):
        site = made.sites[0]
        trace = made.trace(torch.randn(2, 3, 32, 32), [site])
        assert trace.tokens[site].shape[1:] == (made.layout(site).n_tokens, made.d_model(site))
        again = made.resume(trace, site, trace.tokens[site])
        assert torch.equal(again.tokens, trace.output.tokens)
    run = RunConfig(name="mine", n_features=32, sparsity=names["NearTop"](), matryoshka=False)
    config = TrainConfig(n_tokens=6_400, batch_size=128)
    train(store, "early", [run], tmp_path / "saes", config=config)
    sae = load_sae(tmp_path / "saes" / "mine", kinds=[names["NearTop"]])
    references = {"one": torch.randn(16), "two": torch.randn(16)}
    names |= {"store": store, "source": source, "model": model, "sae": sae}
    names["references"] = references
    exec(compile(use_code, "extending.md", "exec"), names)  # noqa: S102
    assert names["change"].shape == (24, 2)
    assert names["effects"].controls.shape == (24, 100, 2)
    assert names["change"].abs().sum() > 0
