"""HTTP to our own endpoint: never through a proxy of the environment, which cannot reach it."""

import urllib.request
from typing import Any

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(url: str, timeout_s: float) -> Any:
    """The response, to be used as a context manager.

    Raises:
        HTTPError, URLError, OSError: as `urllib.request.urlopen`.
    """
    return _DIRECT.open(url, timeout=timeout_s)
