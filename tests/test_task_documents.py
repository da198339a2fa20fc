"""The task guides tell the truth: their commands can be typed, and those of one machine run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from visae.cli import app, main

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(DOCS.glob("tasks/*.md"))
MODEL = "vit_small_patch16_224"


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[list[str]]:
    """The command lines of a guide as visae sees them, torchrun's own arguments removed."""
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^torchrun .* -m visae\.cli ", "visae ", line) for line in lines]
    return [shlex.split(line)[1:] for line in lines if line.startswith("visae ")]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_every_command_of_a_guide_can_be_typed(guide):
    assert guide.stem != "record" or commands(guide)
    for arguments in commands(guide):
        tyro.cli(app._Command, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of two classes, and a tiny model in the place of the guides'."""
    import timm
    import torch

    original = timm.create_model

    def tiny(name, *, pretrained=False, **options):
        assert name == MODEL
        torch.manual_seed(0)
        size = {"embed_dim": 16, "depth": 10, "num_heads": 2}
        return original(name, **options | size)

    monkeypatch.setattr(timm, "create_model", tiny)
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.slow
def test_the_guide_to_recording_runs(photos, capsys):
    for arguments in commands(DOCS / "tasks" / "record.md"):
        if arguments[0] in ("record", "doctor") and "--slurm" not in arguments:
            assert main(arguments) == 0, capsys.readouterr().err
    names = {}
    for code in blocks(DOCS / "tasks" / "record.md", "python"):
        exec(compile(code, "record.md", "exec"), names)  # noqa: S102
    assert names["store"].n_images == 8
    assert names["one"].shape == (197, 16)
    assert "8 ['residual@9'] ('cat', 'dog')" in capsys.readouterr().out
    folder = Path("work/activations/photos")
    assert folder.is_dir()
    (code,) = blocks(DOCS / "formats" / "store.md", "python")
    exec(compile(code.replace("activations/photos", str(folder)), "store.md", "exec"), names)  # noqa: S102
    assert names["patches"].shape == (14, 14, 16)


@pytest.fixture
def recorded(photos):
    """The store that the guide to training begins with."""
    store = ("--site", "residual@9", "--out", "work/activations/photos")
    assert main(["record", "--images", "photos", "--model", MODEL, *store]) == 0
    return Path("work/activations/photos")


@pytest.mark.slow
def test_the_guide_to_training_runs(recorded, capsys):
    guide = DOCS / "tasks" / "train.md"
    (sweep,) = blocks(guide, "toml")
    Path("sweep.toml").write_text(sweep)
    for arguments in commands(guide):
        small = ["--n-tokens", "640", "--batch-size", "64"]
        assert main([*arguments, *small]) == 0, capsys.readouterr().err
    names = ["first", "cats", "seeds-s0", "seeds-s2", "frozen", "shared-s1", "live"]
    names += ["sweep/batch-topk-k32-s1", "sweep/relu-l0.005", "sweep/untrained"]
    for name in names:
        assert (Path("work/saes") / name / "sae.json").is_file(), name
    assert (Path("work/saes/sweep") / "pareto.svg").is_file()
    found = {}
    for code in blocks(guide, "python"):
        small = code.replace("20_000_000, batch_size=4096", "640, batch_size=64")
        exec(compile(small.replace("3072", "64"), "train.md", "exec"), found)  # noqa: S102
    assert [sae.n_features for sae in found["saes"]] == [64, 64]
    assert [row.name for row in found["result"].rows] == ["k16", "k32"]
