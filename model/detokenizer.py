"""Turns the tokens of a growing sequence into text, one at a time, in complete characters only.

Let `whole = tokenizer.decode(prompt + completion)`. The texts that `push` and `flush` return,
joined, are the end of `whole`, from the completion's first character on. Two cases are special:

- The prompt ends inside a character: its last byte pieces are a valid but unfinished beginning of
  one. That character belongs to the completion. If the completion does not finish it, it becomes
  U+FFFD, one for each byte. `decode(prompt)` then ends with those U+FFFD, which the prompt's part
  of `whole` does not have. In every other case `whole == decode(prompt) + completion text`.
- SentencePiece drops the first "▁" of the whole text, not of the completion. So a completion begins
  with the space of its first piece, unless there is no visible text before it.

The state depends on the tokens only: a new detokenizer, whose prompt is the old prompt plus the
tokens pushed so far, continues exactly like the old one. To echo a prompt, push its tokens.
"""

import codecs
from collections.abc import Iterable, Sequence
from itertools import islice

from milliways.model.tokenizer import Tokenizer

# Of the bytes before, none can be part of a character that is unfinished at the end.
_MAX_UNFINISHED = 3


class IncrementalDetokenizer:
    """Takes tokens, returns text; needs constant time and memory per token.

    Of a prompt it reads the last tokens only: three, and those before them up to the first that has
    text.

    Invariant: `_unfinished` holds at most three bytes: a valid beginning of a UTF-8 character.

    Invariant: `_is_first` is true until a piece is pushed that has visible text, or would have it
    if the first "▁" were not dropped.
    """

    __slots__ = (
        "_follows_special",
        "_is_first",
        "_shows_special",
        "_spaces_special",
        "_tokenizer",
        "_unfinished",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        shows_special: bool = False,
        spaces_special: bool = True,
    ) -> None:
        """With `shows_special`, control pieces have their names as text.

        The text between two of them is then a text of its own, without its first space; with
        `spaces_special`, spaces are between it and them.
        """
        self._tokenizer = tokenizer
        self._shows_special = shows_special
        self._spaces_special = spaces_special
        # Whether the last text was that of a control piece.
        self._follows_special = False
        self._unfinished = b""
        before = islice(reversed(prompt_ids), _MAX_UNFINISHED, None)
        # A byte before the last three has become text: alone, or as part of a character.
        self._is_first = not any(_has_text(tokenizer, token_id) for token_id in before)
        # A character begins at its first byte, whatever came before. So these are enough.
        for token_id in prompt_ids[-_MAX_UNFINISHED:]:
            self.push(token_id)

    def copy(self) -> "IncrementalDetokenizer":
        """Another one in the same state, for another sample of a prompt."""
        other = IncrementalDetokenizer(
            self._tokenizer,
            (),
            shows_special=self._shows_special,
            spaces_special=self._spaces_special,
        )
        other._unfinished, other._is_first = self._unfinished, self._is_first
        other._follows_special = self._follows_special
        return other

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that it completes, which may be empty.

        Raises:
            InvalidRequestError: the id is outside the vocabulary; the state has not changed.
        """
        if not self._shows_special:
            return self._push(token_id)
        if self._tokenizer.is_control(token_id):
            return self._push_special(token_id)
        return self._spaced(self._push(token_id))

    def _push(self, token_id: int) -> str:
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            text = self._push_byte(byte)
            self._is_first = self._is_first and not text
            return text
        # Any other piece, even an invisible one, ends the run of bytes.
        broken = self.flush()
        text = self._tokenizer.text_of(token_id, is_first=self._is_first)
        # Not `text`: a lone "▁" at the start has no text, but it is the space that is dropped.
        self._is_first = self._is_first and not self._tokenizer.text_of(token_id)
        return broken + text

    def flush(self) -> str:
        """Ends the text; returns one U+FFFD for each byte of an unfinished character."""
        text = "\ufffd" * len(self._unfinished)
        self._unfinished = b""
        self._is_first = self._is_first and not text
        return text

    def _push_special(self, token_id: int) -> str:
        broken = self._spaced(self.flush())
        has_text_before = not self._is_first or self._follows_special
        space = " " if self._spaces_special and has_text_before else ""
        self._is_first = self._follows_special = True
        return broken + space + self._tokenizer.name_of(token_id)

    def _spaced(self, text: str) -> str:
        """The text, with a space before it if it is the first after a control piece."""
        if not text or not self._follows_special:
            return text
        self._follows_special = False
        return f" {text}" if self._spaces_special else text

    def _push_byte(self, byte: int) -> str:
        text = ""
        rest = self._unfinished + bytes([byte])
        num_used = 1
        while rest and num_used:
            try:
                # final=False: a valid but unfinished beginning decodes to nothing.
                complete, num_used = codecs.utf_8_decode(rest, "strict", False)
                if not num_used and _begins_surrogate(rest):
                    # Python would wait for its third byte, and refuse it then.
                    complete, num_used = "\ufffd", 1
            except UnicodeDecodeError:
                # Byte by byte, as SentencePiece does; Python's "replace" would merge several.
                complete, num_used = "\ufffd", 1
            text += complete
            rest = rest[num_used:]
        self._unfinished = rest
        return text


def _has_text(tokenizer: Tokenizer, token_id: int) -> bool:
    return tokenizer.byte_of(token_id) is not None or bool(tokenizer.text_of(token_id))


def prompt_pieces(tokenizer: Tokenizer, prompt_ids: Iterable[int]) -> list[str]:
    """The text that each token of a prompt completes. An unfinished last character is left out.

    Raises:
        InvalidRequestError: an id is outside the vocabulary.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    return [detokenizer.push(token_id) for token_id in prompt_ids]


def text_offsets(pieces: Iterable[str]) -> list[int]:
    """The position in the joined text at which each piece begins, in characters."""
    offsets: list[int] = []
    num_chars = 0
    for piece in pieces:
        offsets.append(num_chars)
        num_chars += len(piece)
    return offsets


def _begins_surrogate(content: bytes) -> bool:
    """Whether the bytes encode a part of a surrogate, with which no valid character begins."""
    return content[0] == 0xED and content[1:2] >= b"\xa0"
