"""Text of a sequence while it grows, one token at a time, never half a character.

With `whole = tokenizer.decode(prompt + completion)`, what `push` and `flush` return joins to the
end of `whole`, from the character on which the completion begins. Two cases are worth spelling out:

- The prompt ends inside a character (its last byte pieces are a valid but unfinished beginning of
  one). That character belongs to the completion, which finishes it, or fails to and gets the
  U+FFFD. So `decode(prompt)` is longer than the prompt's part of `whole` by those U+FFFD; in every
  other case `whole == decode(prompt) + completion text`.
- SentencePiece drops the first "▁" of the whole text, not of the completion: a completion starts
  with the space that its first piece carries, unless nothing visible stands before it.

The state is a function of the tokens alone: a new detokenizer whose prompt is the old prompt plus
the tokens pushed so far goes on exactly like the old one. To echo a prompt, push it instead.
"""

import codecs
from collections.abc import Iterable

from milliways.model.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Constant work and memory per token: holds at most three bytes of an unfinished character."""

    __slots__ = ("_is_first", "_tokenizer", "_unfinished")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._unfinished = b""
        self._is_first = True
        for token_id in prompt_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text which it completes, possibly none.

        Raises:
            InvalidRequestError: the id is outside the vocabulary; the state is as before.
        """
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            text = self._push_byte(byte)
            self._is_first = self._is_first and not text
            return text
        # Any other piece, even an invisible one, ends the run of bytes.
        broken = self.flush()
        text = self._tokenizer.text_of(token_id, is_first=self._is_first)
        # Not `text`: a lone "▁" at the start shows nothing, but it was the one space to drop.
        self._is_first = self._is_first and not self._tokenizer.text_of(token_id)
        return broken + text

    def flush(self) -> str:
        """Gives up the unfinished character: one U+FFFD for each of its bytes. Ends the text."""
        text = "\ufffd" * len(self._unfinished)
        self._unfinished = b""
        self._is_first = self._is_first and not text
        return text

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


def prompt_pieces(tokenizer: Tokenizer, prompt_ids: Iterable[int]) -> list[str]:
    """The text that each token of a prompt completes; what the last ones leave unfinished is not.

    Raises:
        InvalidRequestError: an id is outside the vocabulary.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    return [detokenizer.push(token_id) for token_id in prompt_ids]


def text_offsets(pieces: Iterable[str]) -> list[int]:
    """Where each piece begins in the text that they make, in characters."""
    offsets: list[int] = []
    num_chars = 0
    for piece in pieces:
        offsets.append(num_chars)
        num_chars += len(piece)
    return offsets


def _begins_surrogate(content: bytes) -> bool:
    """Whether no valid character begins like this, whatever follows: half of a UTF-16 pair."""
    return content[0] == 0xED and content[1:2] >= b"\xa0"
