"""One writer a folder, also when the writer is killed."""

import signal
import subprocess
import sys

import pytest

from visae.errors import StoreError
from visae.storage.locks import exclusive, is_locked

HOLDER = """
import sys
from pathlib import Path
from visae.storage.locks import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path`` until its input closes."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_a_remedy(tmp_path, holder):
    with pytest.raises(StoreError) as caught, exclusive(tmp_path):
        pytest.fail("two writers at once")
    assert str(caught.value) == (
        f"Another process is writing this folder ({tmp_path}). "
        "Wait for it to end, or choose another --out."
    )
    assert holder.poll() is None


def test_the_folder_is_free_when_the_holder_ends(tmp_path, holder):
    holder.communicate("")
    assert holder.returncode == 0
    with exclusive(tmp_path):
        pass


def test_the_folder_is_free_when_the_holder_is_killed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    assert holder.wait(timeout=60) == -signal.SIGKILL
    with exclusive(tmp_path):
        pass


def test_the_same_process_cannot_write_twice(tmp_path):
    refused = pytest.raises(StoreError, match="Another process")
    with exclusive(tmp_path), refused, exclusive(tmp_path):
        pytest.fail("two writers at once")


def test_a_failed_block_frees_the_folder(tmp_path):
    with pytest.raises(RuntimeError), exclusive(tmp_path):
        raise RuntimeError
    with exclusive(tmp_path):
        pass


def test_the_folder_is_made(tmp_path):
    with exclusive(tmp_path / "workspace" / "activations"):
        assert (tmp_path / "workspace" / "activations").is_dir()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StoreError, match="A file stands"), exclusive(tmp_path / "out"):
        pytest.fail("a file is no folder")


def test_a_folder_is_known_to_be_written(tmp_path):
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with exclusive(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with exclusive(tmp_path):
        pass
