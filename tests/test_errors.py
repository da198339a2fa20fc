import pickle

import pytest

from visae import errors
from visae.errors import VisaeError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_come_whole_out_of_another_process(kind):
    assert issubclass(kind, VisaeError)
    error = kind("It broke", where="here", fix="Mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.what, copy.where, copy.fix) == ("It broke", "here", "Mend it")
    assert str(copy) == str(error) == "It broke (here). Mend it."
