import logging

import pytest
import torch

from visae.errors import ConfigError
from visae.saes.config import ArchetypesConfig
from visae.saes.learned import Gated
from visae.saes.sparsity import ReLU, TopK
from visae.training import grouping
from visae.training.config import RunConfig, TrainConfig
from visae.training.grouping import free_memory, split_by_memory, state_bytes, workspace_bytes

CONFIG = TrainConfig(n_tokens=1000, batch_size=100)
PARAMETERS = 2 * 50 * 16 + 50 + 16


def run(name="a", n_features=50, **changes):
    return RunConfig(name=name, n_features=n_features, **{"sparsity": TopK(k=3)} | changes)


def size(one):
    return state_bytes(one, 16, CONFIG), workspace_bytes(one, 16, CONFIG)


def split(runs, n_bytes, key=lambda one: None):
    groups = split_by_memory(runs, lambda one: 16, config=CONFIG, n_bytes=n_bytes, key=key)
    return [[one.name for one in group] for group in groups]


def test_the_estimate_is_the_sum_of_its_parts():
    assert size(run()) == (24 * PARAMETERS, 12 * 100 * 50 + 8 * PARAMETERS)
    assert size(run(sparsity=ReLU())) == (24 * PARAMETERS, 44 * 100 * 50 + 12 * PARAMETERS)
    assert size(run(control="untrained")) == (4 * PARAMETERS, 0)
    averaged = TrainConfig(n_tokens=1000, batch_size=100, average_decay=0.9, engine="reference")
    assert state_bytes(run(), 16, averaged) == 28 * PARAMETERS
    assert workspace_bytes(run(), 16, averaged) == size(run(sparsity=ReLU()))[1]


def test_what_a_kind_or_a_decoder_learns_besides_counts():
    assert size(run(sparsity=Gated()))[0] == 24 * (PARAMETERS + 100)
    archetypes = ArchetypesConfig(n_centroids=7)
    assert size(run(archetypes=archetypes))[0] == 24 * (PARAMETERS + 50 * 7 + 50 * 16 + 16 * 7)


def test_one_group_where_all_fit(caplog):
    runs = [run(name) for name in "abc"]
    held, step = size(run())
    with caplog.at_level(logging.INFO):
        assert split(runs, 3 * held + step) == [["a", "b", "c"]]
    assert "3 SAEs in 1 group of 3" in caplog.text


def test_a_group_holds_what_its_saes_keep_and_its_largest_step(caplog):
    runs = [run(name) for name in "abc"]
    held, step = size(run())
    with caplog.at_level(logging.INFO):
        assert split(runs, 3 * held + step - 1) == [["a", "b"], ["c"]]
    assert "3 SAEs in 2 groups of 2, 1" in caplog.text
    assert split(runs, held + step) == [["a"], ["b"], ["c"]]


def test_runs_of_different_keys_are_not_joined():
    keys = {"a": 1, "b": 2, "c": 1}
    runs = [run(name) for name in "abc"]
    assert split(runs, 10**9, key=lambda one: keys[one.name]) == [["a", "c"], ["b"]]


def test_an_sae_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"large needs some .* GB") as failure:
        split([run(), run("large", n_features=10**7)], 10**7)
    assert "--memory-gb" in failure.value.fix


def test_free_memory_is_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    for name, text in (("max", "1000"), ("current", "600"), ("stat", "anon 5\ninactive_file 100")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    found = grouping._control_group_memory
    assert list(found(tmp_path)) == [500]
    monkeypatch.setattr(grouping, "_control_group_memory", lambda: [500])
    monkeypatch.setattr(grouping, "_system_memory", lambda: [2000])
    assert free_memory(torch.device("cpu")) == 425
    (tmp_path / "memory.max").write_text("max\n")
    assert list(found(tmp_path)) == []
    assert list(found(tmp_path / "none")) == []


def test_where_nothing_is_known_the_user_is_asked(monkeypatch):
    monkeypatch.setattr(grouping, "_control_group_memory", list)
    monkeypatch.setattr(grouping, "_system_memory", list)
    with pytest.raises(ConfigError, match="how much memory"):
        free_memory(torch.device("cpu"))
