"""A model in this process: `LLM`."""

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from milliways.api.prompts import CheckedPrompt, Prompt, checked_prompt, checked_prompts, paired
from milliways.api.results import GenerationResult, Piece, Score, piece_of, result_of, score_of
from milliways.api.sampling import SamplingParams, check_whole
from milliways.cluster.host.local import (
    BLOCK_SIZE,
    kernel_choice,
    load_local_model,
    make_local_engine,
)
from milliways.model.errors import NonFiniteLogitsError, TokenizerError
from milliways.model.model_dir import DEMO_NAME, resolve_model_dir
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SampledToken
from milliways.model.tokenizer import Tokenizer
from milliways.router.engine import LocalEngine
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Event, PromptScores, TokenEvent

_DEFAULT_CACHE_TOKENS = 8192
_MAX_CACHE_TOKENS = 2**31 - 1
_MAX_RUNNING = 1024


class LLM:
    """A model, loaded into this process, that continues and scores prompts.

        with LLM("demo") as llm:
            (result,) = llm.generate(["Welcome to"], SamplingParams(temperature=0))
            print(result.text)

    Prompts are text or token ids. Several threads may use one `LLM`, and several streams may be
    open: one step computes tokens for all of them. Text needs a model with a tokenizer.

    Invariant: `_engine` is only used under `_engine_lock`.
    """

    def __init__(
        self,
        model: str | Path = DEMO_NAME,
        *,
        dtype: str = "float32",
        activations: str = "exact",
        experts: str = "loaded",
        deterministic: bool = False,
        threads: int | None = None,
        kv_cache_tokens: int | None = None,
        max_running: int = 32,
    ) -> None:
        """Loads the model. The first five options are those of `milliways generate`.

        `model`: a model directory, or "demo".
        `dtype`: of activations and of the KV cache, "float32" or "bfloat16".
        `activations`: "exact", or "int8", which is faster and coarser.
        `experts`: "loaded" into memory, or "mapped", which leaves them in their files.
        `deterministic`: on a GPU, keep a token's bits in any batch. A CPU always does.
        `threads`: how many compute on a CPU; None: all that this process may use.
        `kv_cache_tokens`: how many tokens the KV cache holds, of all sequences that run. None: one
        full context of the model, and at least 8192.
        `max_running`: how many sequences one step computes at most. The others wait.

        Raises:
            InvalidRequestError: an option has no such value.
            ModelError: the model cannot be used; says which file is wrong, and why.
        """
        kernels = kernel_choice(
            activations=activations, experts=experts, deterministic=deterministic, threads=threads
        )
        check_whole("max_running", max_running, 1, _MAX_RUNNING)
        if kv_cache_tokens is not None:
            check_whole("kv_cache_tokens", kv_cache_tokens, BLOCK_SIZE, _MAX_CACHE_TOKENS)
        loaded = load_local_model(resolve_model_dir(str(model)), dtype, kernels)
        self._config = loaded.decoder.config
        self._tokenizer = loaded.tokenizer
        num_tokens = kv_cache_tokens or max(self._config.sequence_len, _DEFAULT_CACHE_TOKENS)
        size = CacheSize(
            num_blocks=-(-num_tokens // BLOCK_SIZE), block_size=BLOCK_SIZE, max_slots=max_running
        )
        self._engine_lock = threading.Lock()
        self._engine: LocalEngine | None = make_local_engine(loaded, size)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and its KV cache. Streams that are still open fail."""
        with self._engine_lock:
            self._engine = None

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationResult]:
        """Continues prompts, all in one batch; one result for each, in their order.

        `params` hold for all prompts, or are a list with an entry for each.

        Raises:
            InvalidRequestError: a prompt or a parameter does not fit; nothing is computed then.
            NonFiniteLogitsError: the model computed logits from which no token can be drawn.
        """
        asks = paired(prompts, params)
        requests = [self._request(*ask) for ask in asks]
        pieces: list[list[Piece]] = [[] for _ in asks]
        with closing(self._events(requests)) as events:
            for index, event in events:
                assert isinstance(event, TokenEvent)
                pieces[index].append(piece_of(event, asks[index][1]))
        return [
            result_of(prompt, len(request.prompt_ids), own, sampling.n)
            for (prompt, sampling), request, own in zip(asks, requests, pieces, strict=True)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Piece]:
        """Continues one prompt, and yields each token as it is drawn. Closing it cancels the rest.

        Raises:
            InvalidRequestError: the prompt or a parameter does not fit.
            NonFiniteLogitsError: as `generate`.
        """
        sampling = params or SamplingParams()
        # Here, so that a bad prompt is refused by the call and not by the first `next`.
        request = self._request(checked_prompt(prompt), sampling)
        return self._stream(request, sampling)

    def score(self, texts: Iterable[Prompt], *, top: int = 0) -> list[Score]:
        """The log-probability of each token of each text, but of its first one.

        `top`: how many most likely tokens come with each, at most 20.

        Raises:
            InvalidRequestError, NonFiniteLogitsError: as `generate`.
        """
        prompts = checked_prompts(texts)
        requests = [
            GenerationRequest(prompt_ids=self._ids(prompt), max_tokens=0, prompt_logprobs=top)
            for prompt in prompts
        ]
        tokens: list[list[SampledToken]] = [[] for _ in prompts]
        with closing(self._events(requests)) as events:
            for index, event in events:
                if not isinstance(event, PromptScores):
                    raise NonFiniteLogitsError
                tokens[index] += event.tokens
        return [score_of(*scored) for scored in zip(prompts, tokens, strict=True)]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text.

        Raises:
            TokenizerError: the model has no tokenizer.
            InvalidRequestError: UTF-8 cannot express the text.
        """
        return self._need_tokenizer().encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids.

        Raises:
            TokenizerError: the model has no tokenizer.
            InvalidRequestError: an id lies outside the vocabulary.
        """
        return self._need_tokenizer().decode(token_ids)

    def _stream(self, request: GenerationRequest, params: SamplingParams) -> Generator[Piece]:
        with closing(self._events([request])) as events:
            for _, event in events:
                assert isinstance(event, TokenEvent)
                yield piece_of(event, params)

    def _events(self, requests: Sequence[GenerationRequest]) -> Generator[tuple[int, Event]]:
        """Events of all requests, each with the index of its own.

        The lock is free between two events, so that iterators of several threads take turns.
        """
        with self._engine_lock:
            events = self._open_engine().generate_all(requests)
        try:
            while True:
                with self._engine_lock:
                    self._open_engine()
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            with self._engine_lock:
                events.close()

    def _request(self, prompt: CheckedPrompt, params: SamplingParams) -> GenerationRequest:
        request = GenerationRequest(
            prompt_ids=self._ids(prompt),
            max_tokens=params.max_tokens,
            sampling=params.draw_params(),
            num_samples=params.n,
            stop=tuple(params.stop),
            ignore_eos=params.ignore_eos,
        )
        request.check_fits(self._config)
        return request

    def _ids(self, prompt: CheckedPrompt) -> tuple[int, ...]:
        return tuple(self.encode(prompt)) if isinstance(prompt, str) else prompt

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise TokenizerError("the model directory has no tokenizer.model; give token ids")
        return self._tokenizer

    def _open_engine(self) -> LocalEngine:
        if self._engine is None:
            raise ValueError("this LLM is closed")
        return self._engine
