"""The model hub, when it may not be there: one quick question before a long wait.

Hub clients retry an unreachable hub for most of a minute. ``hub_access`` asks once, waits four
seconds at most, and without an answer switches the client to its cache for the block.
"""

import contextlib
import http.client
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from visae.errors import ModelError

__all__ = ["first_lines", "hub_access", "hub_failures", "require_hub"]

_TIMEOUT_SECONDS = 4.0


@contextlib.contextmanager
def hub_access() -> Iterator[bool]:
    """Whether the hub answers; if not, only its local cache is used inside the block."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    online = not was_offline and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _answers(endpoint: str) -> bool:
    """Whether anything answers at an endpoint in time, whatever it says.

    Asked in a thread, because looking up a host name has no time limit of its own.
    """
    answers: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        answers.put(_ask(endpoint))

    threading.Thread(target=ask, name="visae-ask-hub", daemon=True).start()
    try:
        return answers.get(timeout=_TIMEOUT_SECONDS)
    except queue.Empty:
        return False


def _ask(endpoint: str) -> bool:
    if not endpoint.startswith(("http://", "https://")):
        return False
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except urllib.error.URLError as failure:
        # The hub's own client may trust a certificate that Python's does not: it answered.
        return isinstance(failure.reason, ssl.SSLError)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def require_hub(repository: str, file: str) -> None:
    """Refuse at once what would need a hub that does not answer.

    Raises:
        ModelError: when the hub does not answer and its local cache lacks the file.
    """
    from huggingface_hub import try_to_load_from_cache

    with hub_access() as online:
        if online or isinstance(try_to_load_from_cache(repository, file), str):
            return
    raise ModelError(
        f"The model hub cannot be reached and {repository} is not in its local cache",
        where="--hub",
        fix="Connect to the network, or run the demo without --hub",
    )


def hub_failures() -> tuple[type[Exception], ...]:
    """What a transfer that breaks off raises: the hub's own error, and its HTTP client's."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *HfHubHTTPError.__bases__


def first_lines(failure: Exception) -> str:
    """The beginning of what an exception says, in one line."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] or type(failure).__name__
