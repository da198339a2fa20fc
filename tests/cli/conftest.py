"""A tiny timm model with weights on disk, a folder of images, and the program run in-process."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from visae.cli import main

SPEC = """
name = "red"
hypothesis = "Ablating the feature that best marks red lowers P(red)"
sae = "../saes/first"
store = "../activations/photos"

[selection]
kind = "best-for-class"
class_name = "red"

[task]
pool = "mean-patch"

[outcome]
class_name = "red"
n_per_other_class = 6

[prediction]
direction = "decrease"
smallest_effect = 0.02

[controls]
n_random = 19
n_matched = 5

[doses]
suppression = [-1.0, 0.0, 1.0]
insertion = []
n_images = 4

[statistics]
n_resamples = 1000
n_permutations = 199
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with ``photos`` of two classes and ``weights.safetensors``; not to be changed."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("home")
    generator = np.random.default_rng(0)
    for i in range(48):
        pixels = generator.integers(90, 150, (32, 32, 3), dtype=np.uint8)
        row, column = 16 * generator.integers(0, 2, 2)
        pixels[row : row + 16, column : column + 16] = (230, 20, 20) if i % 2 else (20, 20, 230)
        path = folder / "photos" / ("red" if i % 2 else "blue") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_vit", img_size=32, num_classes=0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def record_arguments(home):
    """What records the photos, with the sites that the experiment needs."""

    def arguments(out, *more):
        return [
            *("record", "--images", home / "photos", "--model", "test_vit"),
            *("--weights", home / "weights.safetensors", "--image-size", 32),
            *("--site", "residual@2", "norm", "--dtype", "float32", "--out", out),
            *more,
        ]

    return arguments


@pytest.fixture(scope="session")
def train_arguments():
    """What trains a tiny SAE in a second."""

    def arguments(store, out, *more):
        return [
            *("train", "--store", store, "--out", out, "--site", "residual@2"),
            *("--n-features", 48, "--k", 3, "--n-tokens", 3000, "--batch-size", 64),
            *more,
        ]

    return arguments


@pytest.fixture(scope="session")
def workspace(record_arguments, train_arguments, tmp_path_factory):
    """A workspace that the program made, up to the index; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "workspace"
    store, sae = folder / "activations" / "photos", folder / "saes" / "first"
    for arguments in (
        record_arguments(store),
        train_arguments(store, sae),
        ["index", "--sae", sae, "--store", store, "--out", folder / "features" / "first@photos"],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    (folder / "specs").mkdir()
    (folder / "specs" / "red.toml").write_text(SPEC)
    return folder


@pytest.fixture
def write_spec(own_workspace):
    """Write the spec with some text replaced; gives its path."""

    def write(old="", new=""):
        assert old in SPEC
        path = own_workspace / "specs" / "changed.toml"
        path.write_text(SPEC.replace(old, new, 1) if old else SPEC)
        return path

    return write


@pytest.fixture
def own_workspace(workspace, tmp_path):
    """A copy of the workspace, to be changed."""
    shutil.copytree(workspace, tmp_path / "workspace")
    return tmp_path / "workspace"


@pytest.fixture
def no_page(monkeypatch):
    """Leave out the page that ``intervene`` writes after the result: drawing takes a second."""
    from visae.reports import experiment_page

    monkeypatch.setattr(
        experiment_page, "write_experiment_report", lambda folder, *_: folder / "report.html"
    )


@pytest.fixture
def visae(capsys):
    """Run the program; gives its exit code, standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(visae):
    """Run what cannot work; checks that one paragraph says so, and gives it."""

    def run(*arguments):
        code, out, error = visae(*arguments)
        lines = [line for line in error.splitlines() if line.startswith("visae: ")]
        assert code == 2, error
        assert len(lines) == 1, error
        assert "Traceback" not in out + error
        assert error.rstrip().endswith(lines[0])
        assert lines[0].rstrip().endswith((".", ")"))
        return lines[0]

    return run
