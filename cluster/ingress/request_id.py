"""The names of requests, and what is made of them instead of being remembered.

A name is 32 hexadecimal digits: when the request came, in milliseconds, then chance. A request that
gives no seed has one made of its name, so that name and body are all that its tokens depend on:
whoever has both can go on with it, and nobody has to store anything.
"""

import hashlib
import re
import secrets
import time

_TIME_DIGITS = 12
_CHANCE_BYTES = 10
_NAME = re.compile(r"[0-9a-f]{32}")


def new_request_id() -> str:
    """Unique, and short enough for logs."""
    return f"{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}{secrets.token_hex(_CHANCE_BYTES)}"


def is_request_id(text: str) -> bool:
    """Whether it has the form of those made here."""
    return _NAME.fullmatch(text) is not None


def created_s_of(request_id: str) -> int:
    """When the request came, in whole seconds since 1970."""
    return int(request_id[:_TIME_DIGITS], 16) // 1000


def seed_of(request_id: str, prompt_index: int = 0) -> int:
    """The seed, of 63 bits, of a prompt of a request that gave none. Prompts differ."""
    digest = hashlib.blake2b(f"{request_id}/{prompt_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
