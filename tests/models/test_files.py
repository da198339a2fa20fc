from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from visae.errors import ModelError
from visae.models.files import hub_files, local_files, read_json
from visae.storage import hub


@pytest.fixture
def online(monkeypatch):
    """A hub that answers; what it says of a file is given by ``say``."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: True)

    def say(answer):
        def download(repository, file, revision=None):
            if isinstance(answer, Exception):
                raise answer
            found = answer / file
            if not found.is_file():
                raise refusal(errors.RemoteEntryNotFoundError)
            return str(found)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    return say


def refusal(kind):
    return kind("it said no", response=SimpleNamespace(headers={}, request=None))


def test_files_of_a_repository_are_fetched_one_by_one(online, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    online(folder)
    with hub_files("lab/model", revision=None, first=("none.json", "config.json")) as files:
        assert (files.name, files.revision, files.folder) == ("lab/model", commit, folder)
        assert files.find("none.json") is None
        assert read_json(files.require("none.json", "config.json", fix="")) == {"a": 1}
        with pytest.raises(ModelError, match=r"lab/model has no a or b .*Do this"):
            files.require("a", "b", fix="Do this")


def test_a_repository_without_the_first_file_is_refused(online, tmp_path):
    online(tmp_path)
    with (
        pytest.raises(ModelError, match=r"lab/model has no config\.json.*for this adapter"),
        hub_files("lab/model", revision=None, first=("config.json",)),
    ):
        pass


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.RepositoryNotFoundError, "no repository lab/model"),
        (errors.GatedRepoError, r"whom its owners let in.*hf auth login"),
        (errors.RevisionNotFoundError, r"lab/model has no revision v9 .*--revision"),
        (errors.HfHubHTTPError, "could not be downloaded: it said no"),
    ],
)
def test_what_the_hub_refuses_is_said(online, kind, said):
    online(refusal(kind))
    with (
        pytest.raises(ModelError, match=said),
        hub_files("lab/model", revision="v9", first=("config.json",)),
    ):
        pass


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionResetError("it broke off"),
        errors.LocalEntryNotFoundError("it broke off"),
        TimeoutError("it broke off"),
        errors.HfHubHTTPError.__bases__[0]("it broke off"),
    ],
)
def test_a_download_that_breaks_off_is_said(online, failure):
    online(failure)
    with (
        pytest.raises(ModelError, match=r"config\.json of lab/model could not.*it broke off"),
        hub_files("lab/model", revision=None, first=("config.json",)),
    ):
        pass


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_said_at_once(monkeypatch, tmp_path, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    with (
        pytest.raises(ModelError, match=r"lab/model is not in the local cache and the model hub"),
        hub_files("lab/model", revision=None, first=("config.json",)),
    ):
        pass


@pytest.mark.parametrize("name", ["a/b/c", "", "-", "a b"])
def test_an_impossible_name_is_refused(online, name):
    with pytest.raises(ModelError), hub_files(name, revision=None, first=("config.json",)):
        pass


def test_files_of_a_folder_are_taken_as_they_are(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    files = local_files(tmp_path)
    assert (files.name, files.revision) == (tmp_path.name, None)
    assert files.find("b.json", "a.json") == tmp_path / "a.json"
    with pytest.raises(ModelError, match="no table of keys"):
        read_json(tmp_path / "a.json")
