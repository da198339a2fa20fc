"""Records as files: what is written is read, and every other file is refused in words."""

import dataclasses
import json
import math
from typing import Literal

import pytest

from visae.errors import ConfigError, StoreError
from visae.storage.records import read_json, read_record, read_toml, write_record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    n_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    kind: Literal["activation-store"] = "activation-store"
    format: int = 2
    title: str
    loss: float = 0.0
    shards: tuple[Shard, ...] = ()


MANIFEST = Manifest(title="größer", shards=(Shard(name="00000.safetensors", n_images=3),))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "store.json"
    write_record(path, MANIFEST)
    return path


def change(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def refusal(path, error=ConfigError):
    with pytest.raises(error) as caught:
        read_record(Manifest, path, error=error)
    return caught.value


def test_a_record_is_read_as_it_was_written(path):
    assert read_record(Manifest, path) == MANIFEST


def test_the_file_is_indented_json_that_people_can_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n "kind": "activation-store",\n "format": 2,\n "title": "größer"')
    assert text.endswith("}\n")


def test_the_file_is_valid_json_whatever_the_numbers(path):
    write_record(path, Manifest(title="t", loss=math.inf))
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict["loss"] == "Infinity"
    assert read_record(Manifest, path).loss == math.inf


def test_another_kind_is_refused(path):
    change(path, kind="sae")
    assert str(refusal(path)) == (
        f"This is sae, not activation-store ({path}). "
        "Give the path of one whose kind is activation-store."
    )


@pytest.mark.parametrize("content", ["{}", "[]", "3", '"activation-store"', "null"])
def test_json_of_another_origin_is_refused(path, content):
    path.write_text(content)
    assert refusal(path).what == "This is no visae file, not activation-store"


def test_a_newer_format_is_refused_before_its_unknown_keys(path):
    change(path, format=3, novelty=True)
    assert str(refusal(path)) == (
        f"Format 3 is newer than format 2, the newest this visae reads ({path}). Upgrade visae."
    )


def test_a_record_that_is_no_file_of_its_own_needs_no_kind(tmp_path):
    shard = Shard(name="a", n_images=1)
    write_record(tmp_path / "shard.json", shard)
    assert read_record(Shard, tmp_path / "shard.json") == shard


@pytest.mark.parametrize("found", [None, "2", 2.0, True, 0, -1])
def test_a_file_without_a_format_is_refused(path, found):
    change(path, format=found)
    assert refusal(path).what == "This file does not say in which format it is written"


def test_problems_name_the_file_and_the_key(path):
    change(path, shards=[{"name": "00000.safetensors", "n_image": 3}])
    assert str(refusal(path)) == (
        "Cannot read this as Manifest: shards[0].n_images: missing; "
        f"unknown key shards[0].n_image (did you mean: n_images, name?) ({path}). "
        "Correct the keys named here."
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"kind": "activation-sto', b"\xff\xfe", b"[" * 100_000]
)
def test_broken_json_is_refused(path, content):
    path.write_bytes(content)
    error = refusal(path, StoreError)
    assert error.what.startswith("This file is not valid JSON: ")
    assert error.where == str(path)
    assert error.fix == "It was altered or cut short: restore it or make it again"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"no such file .*absent\.json"):
        read_json(tmp_path / "absent.json", error=StoreError)
    with pytest.raises(StoreError, match="cannot be read: is a directory"):
        read_json(tmp_path, error=StoreError)


def test_toml_is_read(tmp_path):
    (tmp_path / "spec.toml").write_text('title = "t"\n[analysis]\nseed = 3\n')
    assert read_toml(tmp_path / "spec.toml") == {"title": "t", "analysis": {"seed": 3}}


@pytest.mark.parametrize(
    "content", [b"title = ", b"a = 1\na = 2", b"\xff", b"a = " + b"[" * 100_000]
)
def test_broken_toml_is_refused(tmp_path, content):
    (tmp_path / "spec.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"not valid TOML: .*spec\.toml.*Correct the line named"):
        read_toml(tmp_path / "spec.toml")


def test_a_missing_toml_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file .*spec\.toml"):
        read_toml(tmp_path / "spec.toml")
