import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visae.errors import FeatureIndexError
from visae.features.table import ClassLift, FeatureRow, FeatureTable, Neighbour, write_feature_table

LIVE = FeatureRow(
    feature=0,
    density=0.25,
    n_tokens_active=10,
    n_images_active=4,
    mean_active=1.5,
    q50=1.25,
    q90=2.0,
    q99=2.5,
    max=3.0,
    n_values=10,
    label_entropy=0.5,
    best_class="cat",
    best_class_lift=2.0,
    best_class_count=3,
    classes=("cat", "dog"),
    class_lifts=(2.0, 1.5),
    class_counts=(3, 4),
    position_r2=0.125,
    border_lift=0.0,
    special_share=None,
    flags=("border", "dense"),
    neighbours=(1,),
    neighbour_cosines=(0.5,),
    histogram=(1, 2, 3),
)
DEAD = FeatureRow(
    feature=1,
    density=0.0,
    n_tokens_active=0,
    n_images_active=0,
    mean_active=0.0,
    q50=0.0,
    q90=0.0,
    q99=0.0,
    max=0.0,
    n_values=0,
    label_entropy=None,
    best_class=None,
    best_class_lift=None,
    best_class_count=0,
    classes=(),
    class_lifts=(),
    class_counts=(),
    position_r2=None,
    border_lift=None,
    special_share=None,
    flags=("dead",),
    neighbours=(0,),
    neighbour_cosines=(0.5,),
    histogram=(0, 0, 0),
)


def columns(*rows):
    """Columns as the build makes them: NaN for what is unknown."""
    found = {
        field.name: [getattr(row, field.name) for row in rows]
        for field in dataclasses.fields(FeatureRow)
    }
    for name in ("label_entropy", "position_r2", "border_lift", "special_share"):
        found[name] = np.array([np.nan if v is None else v for v in found[name]])
    return found


@pytest.fixture
def path(tmp_path):
    write_feature_table(tmp_path, "features.parquet", columns(LIVE, DEAD))
    return tmp_path / "features.parquet"


def test_rows_come_back_with_none_for_what_is_unknown(path):
    table = FeatureTable(path)
    assert [table.row(0), table.row(1)] == [LIVE, DEAD]
    assert len(table) == 2
    assert [table.row(0).is_dead, table.row(1).is_dead] == [False, True]
    assert table.row(0).preferred == (ClassLift("cat", 2.0, 3), ClassLift("dog", 1.5, 4))
    assert table.row(0).nearest == (Neighbour(1, 0.5),)


def test_columns_come_as_arrays(path):
    table = FeatureTable(path)
    np.testing.assert_array_equal(table.column("density"), [0.25, 0.0])
    np.testing.assert_array_equal(table.column("label_entropy"), [0.5, np.nan])
    assert table.column("best_class").tolist() == ["cat", None]
    assert table.flagged("dead").tolist() == [False, True]


@pytest.mark.parametrize("feature", [-1, 2])
def test_a_number_out_of_range_is_refused_with_the_range(path, feature):
    with pytest.raises(FeatureIndexError, match=rf"no feature {feature}.* from 0 to 1"):
        FeatureTable(path).row(feature)


def test_an_unknown_statistic_is_refused_with_the_known_ones(path):
    with pytest.raises(FeatureIndexError, match=r"no statistic kurtosis.*density"):
        FeatureTable(path).column("kurtosis")


def test_a_damaged_table_is_refused(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(FeatureIndexError, match="missing or damaged"):
        FeatureTable(path)
    path.unlink()
    with pytest.raises(FeatureIndexError, match="missing or damaged"):
        FeatureTable(path)


def test_another_table_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(FeatureIndexError, match="not visae's table"):
        FeatureTable(tmp_path / "a.parquet")
