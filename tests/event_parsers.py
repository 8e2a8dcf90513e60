"""How clients of the field read a stream, re-made from their rules. Each returns the JSON values.

Each takes the pieces as they come from the network, which may cut anywhere.
"""

import codecs
import json
from collections.abc import Callable, Iterable
from typing import Any

Parser = Callable[[Iterable[bytes]], list[Any]]


def by_blank_lines(pieces: Iterable[bytes]) -> list[Any]:
    """As `vllm bench serve`: messages end at blank lines; those that begin with ":" are skipped.

    What is left in the buffer is a message too, once it is whole JSON.
    """
    buffer, values = "", []
    for piece in pieces:
        buffer += piece.decode()
        *messages, buffer = buffer.split("\n\n")
        if buffer.startswith("data: ") and _is_whole(buffer.removeprefix("data: ").strip()):
            messages.append(buffer)
            buffer = ""
        for message in map(str.strip, messages):
            if message and not message.startswith(":"):
                values += _value(message.removeprefix("data: "))
    return values


def line_by_line(pieces: Iterable[bytes]) -> list[Any]:
    """As `sglang.bench_serving`: every line that is not blank has JSON."""
    values: list[Any] = []
    for line in b"".join(pieces).split(b"\n"):
        if line.strip():
            values += _value(line.strip().decode().removeprefix("data: "))
    return values


def data_lines(pieces: Iterable[bytes]) -> list[Any]:
    """As guidellm and many small clients: only lines that begin with `data:`."""
    lines = b"".join(pieces).decode().splitlines()
    texts = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    return [value for text in texts for value in _value(text)]


def standard(pieces: Iterable[bytes]) -> list[Any]:
    """As OpenAI's own clients: a blank line is an event if there was a field since the last one.

    The id is kept from event to event, so that with one every blank line is an event.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    data: list[str] = []
    values: list[Any] = []
    last_id = ""
    for line in "".join(map(decoder.decode, pieces)).split("\n")[:-1]:
        name, _, value = line.partition(":")
        if not line:
            if data or last_id:
                values += _value("\n".join(data))
            data = []
        elif name == "data":
            data.append(value.removeprefix(" "))
        elif name == "id":
            last_id = value.strip()
    return values


def _is_whole(text: str) -> bool:
    try:
        return bool(_value(text)) or text == "[DONE]"
    except ValueError:
        return False


def _value(text: str) -> list[Any]:
    return [] if text == "[DONE]" else [json.loads(text)]


PARSERS: dict[str, Parser] = {
    "vllm bench serve": by_blank_lines,
    "sglang.bench_serving": line_by_line,
    "guidellm": data_lines,
    "openai": standard,
}
