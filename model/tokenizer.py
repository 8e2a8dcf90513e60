"""SentencePiece, used as the reference uses it; its failures become our errors.

`encode` adds neither BOS nor EOS. This module knows how SentencePiece turns pieces into text, so
that `detokenizer` can do piece by piece what `decode` does at once:

- a control piece has no text; the unknown piece has a text of its own;
- "▁" becomes a space, except one at the very beginning of a text, which `encode` added;
- consecutive byte pieces are UTF-8; each byte that is not part of a character becomes U+FFFD.
"""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from milliways.model.errors import InvalidRequestError, TokenizerError

TOKENIZER_FILE = "tokenizer.model"
_SPACE_MARK = "▁"


class Tokenizer:
    """Turns text into token ids and back. It is immutable, so several threads may use it."""

    __slots__ = ("_processor", "_strips_first_space")

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self._strips_first_space = _probe_first_space(processor)

    @classmethod
    def load(cls, path: Path, vocab_size: int | None) -> "Tokenizer":
        """Reads a SentencePiece model. Its vocabulary must be that of the language model.

        `vocab_size` is the size of that vocabulary; None skips the check.

        Raises:
            TokenizerError: the file is missing or unreadable, is not a SentencePiece model, or its
                number of pieces is not `vocab_size`.
        """
        try:
            serialized = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        return cls.parse(serialized, path, vocab_size)

    @classmethod
    def parse(cls, serialized: bytes, path: Path, vocab_size: int | None) -> "Tokenizer":
        """From the content of a file; `path` is for messages.

        Raises:
            TokenizerError: as `load`.
        """
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(serialized)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        num_pieces = processor.vocab_size()
        if vocab_size is not None and num_pieces != vocab_size:
            raise TokenizerError(
                f"{path}: has {num_pieces} pieces, but the model's vocab_size is {vocab_size}"
            )
        return cls(processor)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        """The piece that begins a sequence, if there is one. `encode` does not add it."""
        piece = self._processor.bos_id()
        return piece if piece >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS.

        Raises:
            InvalidRequestError: the text has a lone surrogate, which UTF-8 cannot encode.
        """
        try:
            utf8 = text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!a} at index {error.start}"
            raise InvalidRequestError("text", where, "Unicode without lone surrogates") from error
        return self._processor.encode(utf8, out_type=int)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence, without its first "▁"; invalid bytes become U+FFFD.

        Raises:
            InvalidRequestError: an id is negative or not below `vocab_size`.
        """
        for token_id in token_ids:
            self._check(token_id)
        return self._processor.decode(list(token_ids)) if token_ids else ""

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a byte piece stands for; None for any other piece.

        Raises:
            InvalidRequestError: the id is negative or not below `vocab_size`.
        """
        self._check(token_id)
        if not self._processor.is_byte(token_id):
            return None
        return int(self._processor.id_to_piece(token_id)[3:5], base=16)  # "<0xE4>"

    def text_of(self, token_id: int, *, is_first: bool = False) -> str:
        """The text of a piece that is not a byte; `is_first` if there is no text before it.

        Raises:
            InvalidRequestError: the id is negative or not below `vocab_size`.
        """
        self._check(token_id)
        if self._processor.is_control(token_id):
            return ""
        if self._processor.is_unknown(token_id):
            return self._processor.decode([token_id])
        piece = self._processor.id_to_piece(token_id)
        if is_first and self._strips_first_space:
            piece = piece.removeprefix(_SPACE_MARK)
        return piece.replace(_SPACE_MARK, " ")

    def is_control(self, token_id: int) -> bool:
        """Whether a piece is a control piece, such as the end of a sequence.

        Raises:
            InvalidRequestError: the id is negative or not below `vocab_size`.
        """
        self._check(token_id)
        return self._processor.is_control(token_id)

    def name_of(self, token_id: int) -> str:
        """The name of a token in a list of tokens. It distinguishes all tokens but a few.

        It is the token's text with its space. A byte is `bytes:\\xe4`, as OpenAI writes it, and a
        piece without text has its SentencePiece name. In Grok-1's vocabulary, only runs of spaces
        exist twice, with equal names.

        Raises:
            InvalidRequestError: the id is negative or not below `vocab_size`.
        """
        byte = self.byte_of(token_id)
        if byte is not None:
            return f"bytes:\\x{byte:02x}"
        return self.text_of(token_id) or self._processor.id_to_piece(token_id)

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError("token id", token_id, f"in 0..{self.vocab_size - 1}")


def _unreadable(path: Path, error: Exception) -> TokenizerError:
    return TokenizerError(f"{path}: cannot be read as a SentencePiece model: {error}")


def _probe_first_space(processor: SentencePieceProcessor) -> bool:
    """Whether decoding removes a "▁" at the beginning. The library does not say, so we try it.

    Raises:
        TokenizerError: decoding removes several of them (remove_extra_whitespaces). Then a text
            would change when it is encoded and decoded.
    """
    mark_id = processor.piece_to_id(_SPACE_MARK)
    if processor.is_unknown(mark_id):
        return _probe_longer_piece(processor)
    num_kept = len(processor.decode([mark_id, mark_id]))
    if num_kept == 0:
        raise TokenizerError(
            "the tokenizer has remove_extra_whitespaces set, which is not supported"
        )
    return num_kept == 1


def _probe_longer_piece(processor: SentencePieceProcessor) -> bool:
    for token_id in range(processor.vocab_size()):
        if processor.id_to_piece(token_id).startswith(_SPACE_MARK):
            return not processor.decode([token_id]).startswith(" ")
    return False
