"""Paths in files survive a move of the workspace, and only of the workspace."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.storage.portable import portable, resolve_portable

NAME = st.text("abc", min_size=1, max_size=3)
PATH = st.lists(NAME, min_size=1, max_size=5).map(lambda names: Path("/", *names))


@given(path=PATH, folder=PATH)
def test_a_path_is_found_again(path, folder):
    assert resolve_portable(portable(path, folder), folder) == path


def test_inside_the_workspace_paths_are_relative(tmp_path):
    sae, store = tmp_path / "saes" / "a", tmp_path / "activations" / "b"
    assert portable(store, sae) == "../../activations/b"
    assert portable(sae / "sae.json", sae) == "sae.json"


def test_a_moved_workspace_finds_its_own_files(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    text = portable(old / "activations" / "b", old / "saes" / "a")
    assert resolve_portable(text, new / "saes" / "a") == new / "activations" / "b"


def test_outside_the_workspace_paths_are_absolute(tmp_path):
    sae, images = tmp_path / "workspace" / "saes" / "a", tmp_path / "images"
    text = portable(images, sae)
    assert text == images.as_posix()
    assert resolve_portable(text, tmp_path / "moved" / "saes" / "a") == images


@pytest.mark.parametrize("folder", ["/store", "/data/store"])
def test_the_root_of_the_file_system_is_no_workspace(folder):
    assert portable(Path("/elsewhere/images"), Path(folder)) == "/elsewhere/images"


def test_a_folder_behind_a_link(tmp_path):
    real, link = tmp_path / "disk" / "saes" / "a", tmp_path / "workspace" / "saes" / "a"
    real.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    store = tmp_path / "disk" / "activations" / "b"
    assert resolve_portable(portable(store, link), link) == store


def test_relative_paths_mean_those_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = portable(Path("activations/b"), Path("saes/a"))
    assert text == "../../activations/b"
    assert resolve_portable(text, Path("saes/a")) == tmp_path / "activations" / "b"
