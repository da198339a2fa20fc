import pickle

import pytest

from visae import errors
from visae.errors import VisaeError

KINDS = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_come_whole_out_of_another_process(kind):
    assert issubclass(kind, VisaeError)
    error = kind("It broke", where="here", fix="Mend it")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is kind
    assert (copy.what, copy.where, copy.fix) == ("It broke", "here", "Mend it")
    assert str(copy) == str(error) == "It broke (here). Mend it."
