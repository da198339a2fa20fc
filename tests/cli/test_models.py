import subprocess
import sys

import pytest

from visae.cli import main


def shown(capsys, *arguments):
    code = main(["models", *map(str, arguments)])
    given = capsys.readouterr()
    return code, given.out, given.err


def test_models_that_match_are_listed(capsys):
    code, out, _ = shown(capsys, "test_vit*", "--limit", "2")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["model", "width", "blocks", "tokens", "sites"]
    assert lines[1].split()[:3] == ["timm/test_vit", "64", "6"]
    assert len(lines) == 4
    assert "more: give a longer pattern, or --limit" in lines[3]


def test_one_model_is_shown_in_detail(capsys):
    code, out, _ = shown(capsys, "test_vit")
    assert code == 0
    assert "timm/test_vit: input 160 × 160 pixels, 6 blocks" in out
    assert "residual@5" in out
    assert "10 × 10" in out


def test_a_convolutional_network_says_that_modules_are_sites(capsys):
    _, out, _ = shown(capsys, "resnet18")
    assert "layer4" in out
    assert "Any module that gives a feature map is a site too" in out


def test_weights_are_shown_with_their_hash(capsys, home):
    weights = home / "weights.safetensors"
    code, out, _ = shown(capsys, "test_vit", "--weights", weights, "--image-size", "32")
    assert code == 0
    assert "input 32 × 32 pixels" in out
    assert "weights: sha256 " in out


def test_a_model_of_ones_own_is_shown_in_detail(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_shown_models.py").write_text(
        "from torch import nn\n"
        "from visae import Preprocessing, VisionModel, wrap_model\n\n"
        "def build() -> VisionModel:\n"
        "    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())\n"
        "    size = Preprocessing(size=(32, 32))\n"
        "    return wrap_model(network, name='mine/cnn', preprocessing=size, sites={'0': None})\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = shown(capsys, "python:my_shown_models:build")
    assert code == 0
    assert "mine/cnn: input 32 × 32 pixels" in out
    assert ["0", "8", "none", "8", "×", "8"] in [line.split() for line in out.splitlines()]


def test_no_match_gives_the_nearest(capsys):
    code, _, err = shown(capsys, "resnt50")
    assert code == 2
    assert "No model's name fits resnt50" in err
    assert "resnet50" in err


@pytest.mark.parametrize("arguments", [["models", "--help"], ["--help"]])
def test_help_loads_no_torch(arguments):
    script = (
        "import sys\nfrom visae.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
