"""Files to and from a hub on this machine, a hub that refuses, and none."""

import pytest
from huggingface_hub import HfApi, constants

from visae.errors import CheckpointError
from visae.storage import hub
from visae.storage.hub_path import HubPath
from visae.storage.hub_transfer import CommitPlan, commit_files, fetch_files

# the hub client's own, when it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PLACE = HubPath(repository="ada/saes", folder="first")


def plan(**changes):
    settings = {
        "place": PLACE,
        "files": {"first/sae.json": b"{}", "first/sae.safetensors": b"weights"},
        "unless_there": {"README.md": b"# SAEs"},
        "message": "Publish",
    }
    return CommitPlan(**settings | changes)


def commit(**changes):
    return commit_files(plan(**changes), error=CheckpointError)


def fetch(place=PLACE, **changes):
    settings = {"required": ("sae.json",), "optional": ("sae.safetensors",)} | changes
    return fetch_files(place, **settings, error=CheckpointError)


def test_what_was_committed_is_fetched(model_hub):
    made = commit()
    found = fetch()
    assert found.place == made.place == PLACE.at(model_hub.repositories["ada/saes"].refs["main"])
    assert made.url.endswith(f"/ada/saes/commit/{made.place.revision}")
    assert (found.folder / "sae.safetensors").read_bytes() == b"weights"


# Committing


def test_a_commit_is_one_and_whole(model_hub):
    commit()
    repository = model_hub.repositories["ada/saes"]
    assert repository.messages == ["initial commit", "Publish"]
    assert set(repository.files) == {
        ".gitattributes",
        "README.md",
        "first/sae.json",
        "first/sae.safetensors",
    }
    assert not repository.private


def test_a_file_on_disk_is_sent_as_it_is(model_hub, tmp_path):
    (tmp_path / "weights").write_bytes(b"from disk")
    commit(files={"first/sae.safetensors": tmp_path / "weights"})
    assert model_hub.repositories["ada/saes"].files["first/sae.safetensors"] == b"from disk"


def test_a_second_commit_replaces_and_clears_what_is_stale(model_hub):
    commit(files={"first/sae.json": b"old", "first/report_card.json": b"old"})
    commit(
        files={"first/sae.json": b"new"},
        unless_there={"README.md": b"another"},
        stale=("first/report_card.json", "first/metrics.jsonl", "first/sae.json"),
    )
    files = model_hub.repositories["ada/saes"].files
    assert files["first/sae.json"] == b"new"
    assert files["README.md"] == b"# SAEs"
    assert "first/report_card.json" not in files


def test_a_private_repository_is_made_private(model_hub, monkeypatch):
    commit(private=True)
    assert model_hub.repositories["ada/saes"].private
    fetch()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-other")
    with pytest.raises(CheckpointError, match=r"no such repository, or shows.*hf auth login"):
        fetch()


def test_what_was_to_be_private_is_not_put_into_a_public_repository(model_hub):
    commit()
    before = dict(model_hub.repositories["ada/saes"].refs)
    with pytest.raises(CheckpointError, match=r"public, and was to be private.*leave --private"):
        commit(private=True, files={"first/sae.json": b"secret"})
    assert model_hub.repositories["ada/saes"].refs == before


def test_nobody_logged_in_is_said_before_anything_is_sent(model_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(CheckpointError, match=r"Nobody is logged in.*hf auth login"):
        commit()
    assert model_hub.repositories == {}
    assert {path for _, path in model_hub.requests} == {"/"}


def test_a_token_that_may_not_write_is_refused(model_hub, monkeypatch):
    commit()
    before = dict(model_hub.repositories["ada/saes"].refs)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(CheckpointError, match=r"does not let this token.*HF_TOKEN"):
        commit(files={"first/sae.json": b"other"})
    assert model_hub.repositories["ada/saes"].refs == before


def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(model_hub, monkeypatch):
    commit()
    repository = model_hub.repositories["ada/saes"]
    original = HfApi.create_commit

    def late(*arguments, **options):
        repository.commit({"first/sae.json": b"theirs"}, "Someone else")
        return original(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(CheckpointError, match=r"Someone else changed.*Try again"):
        commit(files={"first/sae.json": b"other"})
    assert repository.files["first/sae.json"] == b"theirs"


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/preupload/", 400, "refused with status 400"),
        ("/repos/create", 403, "does not let this token"),
        ("/validate-yaml", 400, "did not take it: Invalid metadata in README"),
        ("/lfs/", 400, "refused with status 400"),
    ],
)
def test_what_the_hub_refuses_is_said(model_hub, part, status, said):
    model_hub.refusals[part] = status
    with pytest.raises(CheckpointError, match=said):
        commit(files={"README.md": b"---\n---\n", "first/sae.safetensors": b"weights"})


def test_without_a_hub_nothing_is_sent(model_hub, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    with pytest.raises(CheckpointError, match=r"cannot be reached, and nothing was published"):
        commit()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and nothing.*Unset"):
        commit()
    assert model_hub.requests == []


# Fetching


def test_only_the_named_files_of_the_folder_are_fetched(model_hub):
    commit(files={f"{folder}/{name}": b"." for folder in ("first", "other") for name in "abc"})
    found = fetch(required=("a",), optional=("b", "z"))
    assert sorted(path.name for path in found.folder.parent.rglob("*")) == ["a", "b", "first"]


def test_the_cache_serves_without_a_hub(model_hub, monkeypatch):
    commit()
    online = fetch()
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    model_hub.requests.clear()
    assert fetch() == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == online
    assert model_hub.requests == []


def test_without_a_hub_a_branch_is_the_commit_that_was_fetched_last(model_hub, monkeypatch):
    commit()
    old = fetch()
    commit(files={"first/sae.json": b"new"})
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    assert fetch() == old


def test_a_commit_in_the_cache_is_not_asked_for_again(model_hub):
    commit()
    place = fetch().place
    model_hub.requests.clear()
    assert fetch(place).place == place
    assert model_hub.requests == []


def test_an_older_commit_is_fetched(model_hub):
    old = commit().place
    commit(files={"first/sae.json": b"new"})
    assert (fetch(old).folder / "sae.json").read_bytes() == b"{}"
    assert (fetch().folder / "sae.json").read_bytes() == b"new"


def test_a_tag_is_fetched(model_hub):
    place = commit().place
    model_hub.repositories["ada/saes"].refs["v1.0"] = place.revision
    commit(files={"first/sae.json": b"new"})
    assert fetch(PLACE.at("v1.0")).place == place


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (HubPath(repository="ada/none"), "no such repository"),
        (PLACE.at("v9"), "ada/saes has no revision v9"),
        (PLACE.at("0" * 40), f"ada/saes has no revision {'0' * 40}"),
        (HubPath(repository="ada/saes", folder="third"), r"There is no sae\.json here.*hf://"),
        (HubPath(repository="ada/saes"), r"There is no sae\.json here.*hf://"),
    ],
    ids=["repository", "tag", "commit", "folder", "file"],
)
def test_what_is_not_there_is_named(model_hub, place, said):
    commit()
    with pytest.raises(CheckpointError, match=said):
        fetch(place)


def test_a_hub_that_is_down_is_said_unless_there_is_a_copy(model_hub):
    commit()
    model_hub.refusals["/api/models/"] = 503
    with pytest.raises(CheckpointError, match=r"broke off: .*503.*Try again"):
        fetch()
    model_hub.refusals.clear()
    copy = fetch()
    model_hub.refusals["/api/models/"] = 503
    assert fetch() == copy


def test_without_hub_and_copy_there_is_nothing(model_hub, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    said = rf"hub at {model_hub.endpoint} cannot be reached, and there is no copy.*HF_ENDPOINT"
    with pytest.raises(CheckpointError, match=said):
        fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and there is no copy"):
        fetch()
