"""The model that clients name in requests: its config, tokenizer and template; no weights."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from milliways.cluster.ingress.chat_template import (
    BOS,
    EOS,
    ChatTemplate,
    choose_chat_template,
    load_chat_template,
    split_at_tokens,
)
from milliways.cluster.settings.config import ModelSettings
from milliways.model.config import ModelConfig, load_config
from milliways.model.detokenizer import prompt_pieces
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import (
    description_dir,
    load_tokenizer,
    named_model_dir,
    resolve_model_dir,
)
from milliways.model.small_files import SmallFiles
from milliways.model.tokenizer import Tokenizer
from milliways.wire.errors import UnknownModelError
from milliways.wire.status_codes import abridged

# What may stand before a word without a space. Tokens may join over it, so there are several.
_BEFORE_WORDS = ("\n", ".", "(")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the ingress knows of the model. `revision` says in which numbers it is computed."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate = field(default_factory=ChatTemplate)
    created_s: int = 0
    revision: str = ""
    # The identity of the manifest of the weights that are served; empty while it is not known.
    weights: Callable[[], str] = str

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints promise equal tokens for equal requests."""
        return _fingerprint(f"({self._identity}, {self.weights()!r})")

    @cached_property
    def _identity(self) -> str:
        return f"{self.name!r}, {self.config!r}, {self.revision!r}"

    def check_resume(self, field_name: str, fingerprint: str) -> None:
        """Raises InvalidRequestError if a stream to be resumed began on another model.

        Nothing is checked without a fingerprint: a client need not send it.
        """
        if fingerprint not in ("", self.fingerprint):
            limit = f"{self.fingerprint}, that of the model served here: the rest would not fit"
            raise InvalidRequestError(field_name, abridged(fingerprint), limit)

    def check_name(self, name: str) -> None:
        """Raises UnknownModelError unless `name` is this model's name."""
        if name != self.name:
            raise UnknownModelError(name if len(name) < 100 else abridged(name), self.name)

    def encode(self, text: str, field_name: str = "prompt") -> tuple[int, ...]:
        """Token ids of a text.

        Raises:
            InvalidRequestError: the model has no tokenizer, or the text is not valid Unicode.
        """
        return tuple(self._need_tokenizer(field_name, text).encode(text))

    def encode_chat(self, prompt: str) -> tuple[int, ...]:
        """Token ids of what a chat template made; a token that the model does not have is left out.

        Raises:
            InvalidRequestError: as `encode`.
        """
        tokenizer = self._need_tokenizer("messages", prompt)
        special = {BOS: tokenizer.bos_id, EOS: self.config.eos_token}
        token_ids: list[int] = []
        for part in split_at_tokens(prompt):
            if part not in special:
                token_ids += self.encode(part, "messages")
            elif (token_id := special[part]) is not None:
                token_ids.append(token_id)
        return tuple(token_ids)

    def bad_word_runs(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of texts that must not be drawn: behind a space, and within other text.

        Raises:
            InvalidRequestError: as `encode`, or a word is empty.
        """
        return tuple(dict.fromkeys(run for word in words for run in self._runs_of(word)))

    def _runs_of(self, word: str) -> Iterator[tuple[int, ...]]:
        bare = word.removeprefix(" ")
        if not bare:
            raise InvalidRequestError("bad_words", word, "words that are not empty")
        # The tokenizer adds a space to the beginning of a text.
        yield self.encode(bare, "bad_words")
        for before in _BEFORE_WORDS if bare == word else ():
            head, whole = self.encode(before), self.encode(before + word, "bad_words")
            if whole[: len(head)] == head and len(whole) > len(head):
                yield whole[len(head) :]

    def truncated(self, prompt_ids: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
        """The last `limit` tokens of a prompt; None: all, -1: as many as the context holds.

        Raises:
            InvalidRequestError: there is no such limit.
        """
        if limit is None:
            return prompt_ids
        if limit != -1 and limit < 1:
            raise InvalidRequestError("truncate_prompt_tokens", limit, "at least 1, or -1")
        return prompt_ids[-(self.config.sequence_len if limit == -1 else limit) :]

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of a whole sequence.

        Raises:
            InvalidRequestError: the model has no tokenizer, or an id is outside the vocabulary.
        """
        return self._need_tokenizer("token_ids", token_ids).decode(token_ids)

    def echo(self, token_ids: tuple[int, ...]) -> str:
        """Text of a prompt up to its last complete character; the completion continues there."""
        return "".join(self.echo_pieces(token_ids))

    def echo_pieces(self, token_ids: tuple[int, ...]) -> list[str]:
        """What each token adds to `echo`; empty texts if the model has no tokenizer."""
        if self.tokenizer is None:
            return [""] * len(token_ids)
        return prompt_pieces(self.tokenizer, token_ids)

    def token_name(self, token_id: int) -> str:
        """A token's name in lists of log-probabilities; its id if the model has no tokenizer."""
        return self.tokenizer.name_of(token_id) if self.tokenizer else str(token_id)

    def token_bytes(self, token_id: int) -> list[int] | None:
        """The bytes that a token adds to a text; None if it adds none or they are unknown."""
        if self.tokenizer is None:
            return None
        byte = self.tokenizer.byte_of(token_id)
        if byte is not None:
            return [byte]
        return list(self.tokenizer.text_of(token_id).encode()) or None

    def _need_tokenizer(self, field_name: str, value: object) -> Tokenizer:
        if self.tokenizer is None:
            limit = "token ids, because the model has no tokenizer"
            raise InvalidRequestError(field_name, abridged(value), limit)
        return self.tokenizer


# Every chunk of a stream has it.
@lru_cache(maxsize=16)
def _fingerprint(identity: str) -> str:
    return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def load_served_model(
    settings: ModelSettings, weights: Callable[[], str] = str, known: SmallFiles | None = None
) -> ServedModel:
    """What the ingress needs of a model: from its directory, unless workers have read it.

    `weights` gives the identity of the weights that are served; `known` is what workers have read.

    Raises:
        CheckpointError, ConfigError, TokenizerError: a file is invalid; the error says why.
    """
    if known is None:
        model_dir = resolve_model_dir(settings.path)
        described_in = description_dir(model_dir)
        config = load_config(described_in)
        tokenizer = load_tokenizer(model_dir, config.vocab_size)
        template = load_chat_template(described_in, settings.chat_template)
    else:
        model_dir = named_model_dir(settings.path)
        config = known.config()
        tokenizer = known.tokenizer(config.vocab_size)
        template = choose_chat_template(known.contents, known.folder, settings.chat_template)
    return ServedModel(
        name=settings.name or _default_name(settings.path, model_dir),
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        created_s=int(time.time()),
        revision=f"{settings.dtype}/{settings.activations}",
        weights=weights,
    )


def _default_name(path: str, model_dir: Path) -> str:
    # `demo` stands for a directory of this package: clients use the name `demo`.
    return path if path.isidentifier() else model_dir.name
