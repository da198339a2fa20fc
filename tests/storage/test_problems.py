"""What is wrong with a spec, read aloud."""

import dataclasses

import pytest

from visae.errors import ConfigError, StoreError
from visae.storage.records import from_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    n_draws: int = 100
    seed: int = 0

    def __post_init__(self):
        if self.n_draws < 1:
            raise ConfigError("n_draws is too small", where="n_draws 0", fix="Give at least 1")
        if self.seed < 0:
            raise ConfigError("seed is negative", fix="Give 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    controls: tuple[Control, ...] = ()
    main: Control = Control()
    by_name: dict[str, Control] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    title: str
    analysis: Analysis


def read(**analysis):
    return from_plain(Spec, {"title": "t", "analysis": analysis}, where="spec.toml")


def said(**analysis):
    with pytest.raises(ConfigError) as caught:
        read(**analysis)
    return str(caught.value)


def test_a_misspelt_key_is_named_in_full_with_the_nearest_ones():
    assert said(main={"n_drws": 3}) == (
        "Cannot read this as Spec: unknown key analysis.main.n_drws (did you mean: n_draws?) "
        "(spec.toml). Correct the keys named here."
    )


def test_a_misspelt_key_deep_in_a_list_or_table_is_named_in_full():
    assert "unknown key analysis.controls[1].sed (did you mean: seed?)" in said(
        controls=[{}, {"sed": 1}]
    )
    assert "unknown key analysis.by_name.position.seeds (did you mean: seed?)" in said(
        by_name={"position": {"seeds": 1}}
    )


def test_a_key_like_no_other_lists_the_known_ones():
    assert "unknown key analysis.zzz (did you mean: by_name, controls, main?)" in said(zzz=1)


def test_every_problem_is_told_at_once_in_the_order_of_the_fields():
    with pytest.raises(ConfigError) as caught:
        from_plain(Spec, {"titel": "t", "analysis": {"controls": [{"seed": "x"}], "main": 3}})
    assert caught.value.what == (
        "Cannot read this as Spec: title: missing; "
        "analysis.controls[0].seed: 'x' is not a whole number; "
        "analysis.main: 3 is not a table of keys; "
        "unknown key titel (did you mean: title?)"
    )


def test_a_check_of_the_record_itself_keeps_its_words_and_its_remedy():
    assert said(main={"n_draws": 0}) == (
        "Cannot read this as Spec: analysis.main: n_draws is too small (n_draws 0) (spec.toml). "
        "Give at least 1."
    )


def test_remedies_are_told_once_each():
    text = said(controls=[{"n_draws": 0}, {"n_draws": 0}, {"seed": -1}], main={"sed": 1})
    assert text.endswith(
        "(spec.toml). Give at least 1. Give 0 or more. Correct the keys named here."
    )


def test_the_check_of_the_outermost_record_needs_no_path():
    with pytest.raises(ConfigError, match=r"Control: seed is negative\. Give 0 or more"):
        from_plain(Control, {"seed": -1})


def test_the_caller_chooses_the_error():
    with pytest.raises(StoreError, match="seed is negative"):
        from_plain(Control, {"seed": -1}, error=StoreError)


def test_data_that_is_no_table_at_all():
    with pytest.raises(ConfigError, match=r"Spec: \[\] is not a table of keys"):
        from_plain(Spec, [])


def test_errors_without_words_give_their_name():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Broken:
        def __post_init__(self):
            raise LookupError

    with pytest.raises(ConfigError, match="Broken: LookupError"):
        from_plain(Broken, {})
