"""Request ids, and the values derived from them: a request's time and its default seed.

An id is 32 hexadecimal digits: the arrival time in milliseconds, then random digits. The seed of a
request that gives none is derived from its id. So a request's tokens depend on its id and its body
only. A client that sends both again can resume the request on any replica, and no replica stores
anything for it.
"""

import hashlib
import re
import secrets
import time

_TIME_DIGITS = 12
_RANDOM_BYTES = 10
_ID_PATTERN = re.compile(r"[0-9a-f]{32}")


def new_request_id() -> str:
    """A new unique id."""
    return f"{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"


def is_request_id(text: str) -> bool:
    """Whether a text has the form of our request ids."""
    return _ID_PATTERN.fullmatch(text) is not None


def created_s_of(request_id: str) -> int:
    """Arrival time of the request, in whole seconds since 1970."""
    return int(request_id[:_TIME_DIGITS], 16) // 1000


def seed_of(request_id: str, prompt_index: int = 0) -> int:
    """The 63-bit seed of a prompt in a request that gave none; different for each prompt."""
    digest = hashlib.blake2b(f"{request_id}/{prompt_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
