import contextlib
import http.server
import socket
import ssl
import threading
import urllib.error
from pathlib import Path

import pytest
from huggingface_hub import constants

from visae.errors import ModelError
from visae.storage import hub
from visae.storage.hub import hub_access


class Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def server(status):
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def unused_endpoint():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def asked_at(monkeypatch):
    """Whether the hub is found online at an endpoint, and offline mode inside the block."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def ask(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with hub_access() as online:
            return online, constants.HF_HUB_OFFLINE

    return ask


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_any_answer_counts(asked_at, status):
    with server(status) as endpoint:
        assert asked_at(endpoint) == (True, False)


def test_without_an_answer_the_cache_is_used_inside_the_block_alone(asked_at):
    assert asked_at(unused_endpoint()) == (False, True)
    assert constants.HF_HUB_OFFLINE is False


def test_offline_mode_is_kept_without_asking(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail(f"asked {endpoint}"))
    with hub_access() as online:
        assert not online
    assert constants.HF_HUB_OFFLINE is True


def test_a_server_that_never_answers_is_given_up(asked_at, monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert asked_at(endpoint) == (False, True)


def test_a_look_up_without_end_is_given_up(asked_at, monkeypatch):
    released = threading.Event()

    def hang(*_, **__):
        released.wait(10)
        raise urllib.error.URLError("at last")

    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    assert asked_at("http://slow.invalid") == (False, True)
    released.set()


def test_a_certificate_that_only_python_distrusts_is_an_answer(asked_at, monkeypatch):
    def distrust(*_, **__):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("unknown authority"))

    monkeypatch.setattr(hub.urllib.request, "urlopen", distrust)
    assert asked_at("https://mirror.invalid") == (True, False)


@pytest.mark.parametrize("endpoint", ["", "mirror", "file:///etc/passwd", "http://a:port"])
def test_what_is_no_address_does_not_answer(asked_at, endpoint):
    assert asked_at(endpoint) == (False, True)


def test_what_needs_an_unreachable_hub_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be reached and owner/name is not in its local"):
        hub.require_hub("owner/name", "model.safetensors")


def test_a_cached_file_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    hub.require_hub("owner/name", "model.safetensors")
