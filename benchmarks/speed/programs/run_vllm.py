"""vLLM's CPU build as a contestant: a Mixtral of our sizes with dummy weights.

Its graph is not Grok-1's: it has no second norms, no cap on attention logits, and SiLU. It does a
little less work. Run by that engine's Python: run_vllm.py SIZES_JSON NUM_THREADS DTYPE
"""

import json
import os
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from line_protocol import Measure, serve  # pyright: ignore[reportImplicitRelativeImport]

_MAX_BATCH = 64
_KV_CACHE_GIB = 1


class Bench:
    """The engine. This process steps it, so that prefill is not part of the decoding time."""

    def __init__(self, sizes: dict[str, Any], num_threads: int, dtype_name: str) -> None:
        _set_environment(num_threads)
        self._vllm: Any = import_module("vllm")
        self._vocab_size: int = sizes["vocab_size"]
        self._num_requests = 0
        self._rng = random.Random(0)
        with tempfile.TemporaryDirectory() as model_dir:
            config = sizes | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
            (Path(model_dir) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            llm = self._vllm.LLM(
                model=model_dir,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=dtype_name,
                max_model_len=min(1024, sizes["max_position_embeddings"]),
                max_num_seqs=_MAX_BATCH,
                enforce_eager=True,
                enable_prefix_caching=False,
            )
        self._engine: Any = llm.llm_engine

    @property
    def versions(self) -> str:
        return f"vllm {self._vllm.__version__}"

    def measure(self, request: dict[str, Any]) -> tuple[int, float]:
        """Times one request of the line protocol."""
        if request["kind"] == "prefill":
            return self._prefill(request["size"])
        return self._decode(request["size"], request["prompt_tokens"], request["steps"])

    def _prefill(self, num_tokens: int) -> tuple[int, float]:
        start_s = time.perf_counter()
        self._add(num_tokens, 1)
        self._run()
        return num_tokens, time.perf_counter() - start_s

    def _decode(self, batch: int, num_prompt_tokens: int, num_steps: int) -> tuple[int, float]:
        """Times `num_steps` steps, from the step at which every sequence has its first token."""
        # A sequence whose prefill ends early runs ahead, so each asks for more than is counted.
        num_tokens = {self._add(num_prompt_tokens, num_steps + batch): 0 for _ in range(batch)}
        while min(num_tokens.values()) < 1:
            self._step(num_tokens)
        num_before = sum(num_tokens.values())
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self._step(num_tokens)
        seconds = time.perf_counter() - start_s
        self._engine.abort_request(list(num_tokens))
        self._run()
        return sum(num_tokens.values()) - num_before, seconds

    def _add(self, num_prompt_tokens: int, num_tokens: int) -> str:
        self._num_requests += 1
        request_id = str(self._num_requests)
        token_ids = [self._rng.randrange(3, self._vocab_size) for _ in range(num_prompt_tokens)]
        sampling = self._vllm.SamplingParams(
            max_tokens=num_tokens, ignore_eos=True, temperature=0, detokenize=False
        )
        self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, sampling)
        return request_id

    def _step(self, num_tokens: dict[str, int]) -> None:
        for output in self._engine.step():
            num_tokens[output.request_id] = len(output.outputs[0].token_ids)

    def _run(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


def _set_environment(num_threads: int) -> None:
    """Sets the variables that vLLM reads when it is imported."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_KV_CACHE_GIB)
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"


def load() -> tuple[str, Measure]:
    """Builds the engine from the command line."""
    sizes, num_threads, dtype_name = sys.argv[1:]
    bench = Bench(json.loads(sizes), int(num_threads), dtype_name)
    return f"{dtype_name}, eager, {bench.versions}, Mixtral of the same sizes", bench.measure


if __name__ == "__main__":
    serve(load)
