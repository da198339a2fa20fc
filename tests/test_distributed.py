"""Processes that work as one: two real ones, joined by gloo."""

import pytest

from visae.distributed import Ranks, joined_ranks
from visae.errors import ConfigError, StoreError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

EVERYTHING = """
import time
from visae.errors import ImageError, StoreError

print(ranks.rank, ranks.world_size, ranks.local_rank, ranks.n_local, ranks.is_first)
print(ranks.gather({"rank": ranks.rank}))
print(ranks.first(lambda: f"told by {ranks.rank}"))

def refuse():
    raise StoreError("It is locked", where="folder", fix="Wait")

try:
    ranks.first(refuse)
except StoreError as error:
    print(error)
for _ in range(3):
    ranks.count("images", 1 + ranks.rank)
ranks.gather(None)
print(ranks.count("images", 0))
ranks.gather(None)

def work():
    ranks.count("images", 1)
    if ranks.rank == 1:
        raise ImageError("Image 7 is broken", where="7", fix="Mend it")
    while True:
        time.sleep(0.01)
        ranks.count("images", 1)

try:
    ranks.together(work)
except ImageError as error:
    print(error)
"""


def test_two_processes_work_as_one(run_ranks):
    first, second = (out.splitlines() for out in run_ranks(EVERYTHING))
    assert (first[0], second[0]) == ("0 2 0 2 True", "1 2 1 2 False")
    for lines in (first, second):
        assert lines[1] == "[{'rank': 0}, {'rank': 1}]"
        assert lines[2] == "told by 0"
        assert lines[3] == "It is locked (folder). Wait."
        assert lines[4] == str(3 * 1 + 3 * 2)
    assert first[5] == "Rank 1 of 2 failed: Image 7 is broken (7). Mend it."
    assert second[5] == "Image 7 is broken (7). Mend it."


@pytest.fixture
def alone(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_one_process_needs_no_torchrun():
    with joined_ranks() as ranks:
        assert ranks == Ranks()
        assert ranks.is_first
        assert ranks.gather(3) == [3]
        assert ranks.first(lambda: 4) == 4
        assert ranks.device("auto") == "auto"
        assert [ranks.count("a", 2), ranks.count("b", 1), ranks.count("a", 3)] == [2, 1, 5]


def test_a_failure_of_one_process_is_its_own():
    def refuse():
        raise StoreError("It is locked", where="folder", fix="Wait")

    for work in (Ranks().first, Ranks().together):
        with pytest.raises(StoreError, match=r"It is locked \(folder\)\. Wait\."):
            work(refuse)


def test_half_of_torchruns_variables_are_refused(monkeypatch, alone):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ConfigError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*torchrun"),
        joined_ranks(),
    ):
        pass


@pytest.mark.parametrize("world_size", ["two", "-2", ""])
def test_variables_that_are_no_numbers_are_refused(monkeypatch, alone, world_size):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with (
        pytest.raises(ConfigError, match=rf"not a number.*WORLD_SIZE={world_size},.*torchrun"),
        joined_ranks(),
    ):
        pass


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    ranks = Ranks(rank=5, world_size=8, local_rank=1, n_local=4)
    assert [ranks.device(d) for d in ("auto", "cuda", "cuda:3", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:3",
        "cpu",
    ]
    assert Ranks().device("auto") == "auto"
