"""The model hub, when it may not be there: one quick question before a long wait.

Hub clients retry an unreachable hub for most of a minute. ``hub_access`` asks once, within five
seconds, and where there is no answer switches the client to its cache for the block.
"""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator

__all__ = ["hub_access"]

_TIMEOUT_SECONDS = 5.0


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
    if not endpoint.startswith(("http://", "https://")):
        return False
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return True
    except (urllib.error.URLError, TimeoutError, OSError):
        return False
    return True
