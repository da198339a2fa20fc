"""The package as others get it: built, installed in a fresh environment, and opened."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "visae"

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """The output of a command that must succeed."""
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def source_files() -> set[str]:
    """Every file of the source but caches, as it should be named in the wheel."""
    found = (path.relative_to(SOURCE.parent) for path in SOURCE.rglob("*") if path.is_file())
    caches = re.compile(r"__pycache__|\..+")
    return {path.as_posix() for path in found if not any(map(caches.fullmatch, path.parts))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source archive, so that both are known to be whole."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, and with the dependencies of the one that runs this."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_holds_every_file_of_the_source(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("visae/")}
    assert packed == source_files()
    assert {"visae/py.typed", "visae/images/data/cifar10.png"} <= packed


def test_the_installed_package_is_the_one_that_opens(installed):
    code = "import visae; print(visae.__file__, visae.__version__)"
    path, version = run(installed / "bin" / "python", "-c", code, cwd=installed).split()
    assert Path(path).is_relative_to(installed)
    assert f"visae-{version}.dist-info" in {path.name for path in installed.glob("lib/*/*/*")}


def test_the_installed_command_helps(installed):
    text = run(installed / "bin" / "visae", "--help", cwd=installed)
    for verb in ("record", "train", "evaluate", "index", "intervene", "report", "demo"):
        assert verb in text


def test_bundled_files_open(installed):
    code = "from importlib.resources import files; print(len((files('visae') / {!r}).read_bytes()))"
    for name in ("images/data/cifar10.png", "py.typed"):
        n_bytes = run(installed / "bin" / "python", "-c", code.format(name), cwd=installed)
        assert int(n_bytes) == (SOURCE / name).stat().st_size
