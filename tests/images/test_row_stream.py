from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ImageError, VisaeError
from visae.images.row_stream import RowStream


class Rows:
    """A stream that counts what is read of it, and may break off."""

    def __init__(self, n_rows, *, start=0, log=None, break_at=None):
        self.n_rows, self.start, self.break_at = n_rows, start, break_at
        self.log = [] if log is None else log

    def skip(self, n_rows):
        return Rows(self.n_rows, start=n_rows, log=self.log, break_at=self.break_at)

    def __iter__(self):
        for number in range(self.start, self.n_rows):
            if number == self.break_at:
                raise ConnectionError("Server gone.\nmore")
            self.log.append(number)
            yield {"number": number}


def numbers(stream, wanted):
    return [stream.row(number)["number"] for number in wanted]


@given(st.lists(st.integers(0, 3000), max_size=20))
def test_any_row_is_the_one_of_its_number(wanted):
    assert numbers(RowStream(Rows(3001), where="it"), wanted) == wanted


@given(st.permutations(range(30)))
def test_rows_a_little_out_of_order_are_read_once(wanted):
    rows = Rows(30)
    stream = RowStream(rows, where="it")
    stream.row(0)
    assert numbers(stream, wanted) == wanted
    assert rows.log == list(range(30))


def test_threads_share_one_stream():
    rows = Rows(500)
    stream = RowStream(rows, where="it")
    stream.row(0)
    found = []
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, 500, 50):  # no thread can fall behind the rows that are kept
            some = range(start, start + 50)
            found += pool.map(lambda number: stream.row(number)["number"], some)
    assert found == list(range(500))
    assert rows.log == list(range(500))


def test_a_row_far_back_starts_again_and_one_far_ahead_is_skipped_to():
    rows = Rows(5000)
    stream = RowStream(rows, where="it")
    assert numbers(stream, [200, 4000, 3]) == [200, 4000, 3]
    assert rows.log == [*range(201), 4000, 3]


def test_what_is_kept_is_bounded():
    rows = Rows(400)
    stream = RowStream(rows, where="it")
    numbers(stream, range(400))
    rows.log.clear()
    assert numbers(stream, range(336, 400)) == list(range(336, 400))
    assert rows.log == []
    stream.row(335)
    assert rows.log == [335]


def test_the_end_is_told_and_asked_once():
    rows = Rows(3)
    stream = RowStream(rows, where="it")
    for number in (5, 3, 4):
        with pytest.raises(ImageError, match=rf"ends before row {number} \(it\).*\?n="):
            stream.row(number)
    assert rows.log == [0, 1, 2]
    assert stream.row(2) == {"number": 2}


def test_a_stream_that_breaks_off_is_no_bad_image_and_goes_on_later():
    rows = Rows(9, break_at=4)
    stream = RowStream(rows, where="it")
    numbers(stream, range(4))
    with pytest.raises(VisaeError, match=r"broke off at row 4: Server gone \(it\)") as caught:
        stream.row(4)
    assert not isinstance(caught.value, ImageError)
    with pytest.raises(VisaeError, match="broke off"):
        stream.row(4)
    assert stream.row(3) == {"number": 3}


def test_a_copy_in_another_process_starts_anew(sent):
    stream = RowStream(range_of_rows(), where="it")
    stream.row(2)
    assert sent(stream).row(1) == {"number": 1}


def range_of_rows():
    import datasets

    return datasets.IterableDataset.from_generator(_three_rows)


def _three_rows():
    yield from ({"number": number} for number in range(3))
