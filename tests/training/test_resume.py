import pytest
import torch

from visae.activations.mixing_buffer import LoaderState
from visae.errors import CheckpointError
from visae.training.resume import (
    ResumePoint,
    check_points,
    latest_common_step,
    read_point,
    remove_points,
    write_point,
)

RECIPE = {"site": "residual@1", "loop": {"batch_size": 64, "data_seed": 0}}


def write(folder, step):
    point = ResumePoint(
        step=step, loader=LoaderState(n_pass=1, fill=2, n_tokens=step), recipe=RECIPE
    )
    write_point(folder, point, {"weights": torch.full((3,), float(step))})


def steps(folder):
    return sorted(path.stem for path in (folder / "resume").glob("*.json"))


def test_a_point_is_read_as_it_was_written(tmp_path):
    write(tmp_path, 7)
    point, state = read_point(tmp_path, 7)
    assert point.loader == LoaderState(n_pass=1, fill=2, n_tokens=7)
    assert torch.equal(state["weights"], torch.full((3,), 7.0))


def test_the_two_newest_points_are_kept(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step)
    assert steps(tmp_path) == ["00000015", "100000000"]
    assert len(list((tmp_path / "resume").iterdir())) == 4


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [([5, 10], [5, 10], 10), ([5, 10], [5], 5), ([10], [5], None), ([5], [], None), ([], [], None)],
)
def test_a_group_resumes_from_the_newest_step_of_all(tmp_path, first, second, common):
    for name, written in (("a", first), ("b", second)):
        for step in written:
            write(tmp_path / name, step)
    assert latest_common_step([tmp_path / "a", tmp_path / "b"]) == common


def test_a_point_without_its_json_does_not_count(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    (tmp_path / "resume" / "00000010.json").unlink()
    assert latest_common_step([tmp_path]) == 5


def test_points_are_removed(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "resume" / ".00000010.json.0123abcd.tmp").write_text("{")
    remove_points(tmp_path)
    assert not (tmp_path / "resume").exists()
    remove_points(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({**RECIPE, "site": "mlp@1"}, "site: 'residual@1' then, 'mlp@1' now"),
        (
            {**RECIPE, "loop": {"batch_size": 32, "data_seed": 0}},
            r"loop\.batch_size: 64 then, 32 now",
        ),
    ],
)
def test_points_of_another_run_are_refused(tmp_path, recipe, said):
    check_points(tmp_path, recipe=recipe)
    write(tmp_path, 5)
    check_points(tmp_path, recipe=RECIPE)
    with pytest.raises(CheckpointError, match=f"other settings .{said}.*another --out"):
        check_points(tmp_path, recipe=recipe)


@pytest.mark.parametrize("name", ["00000005.json", "00000005.safetensors"])
def test_a_damaged_point_is_refused(tmp_path, name):
    write(tmp_path, 5)
    path = tmp_path / "resume" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError):
        read_point(tmp_path, 5)
