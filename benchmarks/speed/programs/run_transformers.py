"""Hugging Face transformers as a contestant: a Mixtral of our sizes with random weights.

Its graph is not Grok-1's: it has no second norms, no cap on attention logits, and SiLU. It does a
little less work. Run by that engine's Python: run_transformers.py SIZES_JSON NUM_THREADS DTYPE
"""

import json
import sys
import time
from importlib import import_module
from typing import Any

from line_protocol import Measure, serve  # pyright: ignore[reportImplicitRelativeImport]


class Bench:
    """The model, and a cache for each batch size.

    Invariant: each cache begins with the prompts; what follows is cut off before each repeat.
    """

    def __init__(self, sizes: dict[str, Any], num_threads: int, dtype_name: str) -> None:
        self._torch: Any = import_module("torch")
        self._transformers: Any = import_module("transformers")
        self._torch.set_num_threads(num_threads)
        self._torch.manual_seed(0)
        self._torch.set_default_dtype(getattr(self._torch, dtype_name))
        config = self._transformers.MixtralConfig(**sizes)
        self._model: Any = self._transformers.MixtralForCausalLM(config).eval()
        self._vocab_size: int = sizes["vocab_size"]
        self._caches: dict[int, Any] = {}

    @property
    def versions(self) -> str:
        return f"transformers {self._transformers.__version__}, torch {self._torch.__version__}"

    def measure(self, request: dict[str, Any]) -> tuple[int, float]:
        """Times one request of the line protocol."""
        with self._torch.inference_mode():
            if request["kind"] == "prefill":
                return self._prefill(request["size"])
            return self._decode(request["size"], request["prompt_tokens"], request["steps"])

    def _prefill(self, num_tokens: int) -> tuple[int, float]:
        cache = self._new_cache()
        start_s = time.perf_counter()
        self._step(cache, 1, num_tokens)
        return num_tokens, time.perf_counter() - start_s

    def _decode(self, batch: int, num_prompt_tokens: int, num_steps: int) -> tuple[int, float]:
        if batch not in self._caches:
            self._caches[batch] = self._new_cache()
            self._step(self._caches[batch], batch, num_prompt_tokens)
        cache = self._caches[batch]
        if added := cache.get_seq_length() - num_prompt_tokens:
            cache.crop(-added)
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self._step(cache, batch, 1)
        return batch * num_steps, time.perf_counter() - start_s

    def _step(self, cache: Any, batch: int, num_tokens: int) -> None:
        token_ids = self._torch.randint(3, self._vocab_size, (batch, num_tokens))
        self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _new_cache(self) -> Any:
        return self._transformers.DynamicCache(config=self._model.config)


def load() -> tuple[str, Measure]:
    """Builds the model from the command line."""
    sizes, num_threads, dtype_name = sys.argv[1:]
    bench = Bench(json.loads(sizes), int(num_threads), dtype_name)
    return f"{dtype_name}, {bench.versions}, Mixtral of the same sizes", bench.measure


if __name__ == "__main__":
    serve(load)
