"""Request ids, and the values derived from them: a request's time and its default seed.

An id is 32 hexadecimal digits: the arrival time in milliseconds, then random digits. The seed of a
request that gives none is derived from its id. So a request's tokens depend on its id and its body
only. A client that sends both again can resume the request on any replica, and no replica stores
anything for it.

A client or a proxy may name a request itself. Then answers and logs have that name, and an id of
ours is behind it, unless the name is a new id of ours.
"""

import hashlib
import re
import secrets
import time

_TIME_DIGITS = 12
_RANDOM_BYTES = 10
_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
# An id of ours is used again within this time at most: it is a name that was given just now.
_NEW_FOR_S = 86400
_MAX_NAME_CHARS = 128
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._:/+=-]")


def new_request_id() -> str:
    """A new unique id."""
    return f"{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"


def is_request_id(text: str) -> bool:
    """Whether a text has the form of our request ids."""
    return _ID_PATTERN.fullmatch(text) is not None


def name_of(given: bytes | None, last_event_id: bytes | None) -> str:
    """The name of an HTTP request in its answer and in logs.

    `given` is the client's X-Request-Id, of which only characters fit for logs and headers stay.
    Without one, a request that is resumed keeps the id in `last_event_id`, and another gets a new
    one.
    """
    name = _NOT_IN_NAME.sub("", (given or b"").decode("latin-1"))[:_MAX_NAME_CHARS]
    first = (last_event_id or b"").decode("latin-1").partition("/")[0]
    return name or (first if is_request_id(first) else new_request_id())


def id_behind(name: str) -> str:
    """The id of a request with this name."""
    is_new = is_request_id(name) and abs(created_s_of(name) - time.time()) < _NEW_FOR_S
    return name if is_new else new_request_id()


def created_s_of(request_id: str) -> int:
    """Arrival time of the request, in whole seconds since 1970."""
    return int(request_id[:_TIME_DIGITS], 16) // 1000


def seed_of(request_id: str, prompt_index: int = 0) -> int:
    """The 63-bit seed of a prompt in a request that gave none; different for each prompt."""
    digest = hashlib.blake2b(f"{request_id}/{prompt_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
