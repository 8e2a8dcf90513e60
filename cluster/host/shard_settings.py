"""What the settings of a cluster say about the shards of a worker: KV arrays, kernels, text."""

from milliways.cluster.host.model_bytes import kv_tokens_of
from milliways.cluster.settings.config import ClusterConfig
from milliways.model.activations import Activations
from milliways.model.config import ModelConfig
from milliways.model.detokenizer import IncrementalDetokenizer
from milliways.model.ops.select import KernelChoice, Residence
from milliways.model.runner import CacheSize
from milliways.model.tokenizer import Tokenizer
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Detokenizer, NoText


def cache_size_of(config: ClusterConfig, model: ModelConfig) -> CacheSize:
    """The size of the KV arrays of an attention shard."""
    block_size = config.workers.block_size
    return CacheSize(
        num_blocks=-(-kv_tokens_of(config.workers, model.sequence_len) // block_size),
        block_size=block_size,
        max_slots=config.router.max_running,
    )


def kernels_of(config: ClusterConfig) -> KernelChoice:
    """What the kernels of a worker must be able to do."""
    threads = config.workers.threads_each or max(1, round(config.workers.cpus_each))
    return KernelChoice(
        activations=Activations(config.model.activations),
        residence=Residence(config.model.experts),
        deterministic=config.model.deterministic,
        num_threads=threads,
    )


def detokenizer_for(tokenizer: Tokenizer | None, request: GenerationRequest) -> Detokenizer:
    """The detokenizer of a request. It makes no text if the model has no tokenizer."""
    if tokenizer is None:
        return NoText()
    return IncrementalDetokenizer(
        tokenizer,
        request.prompt_ids,
        shows_special=request.rules.shows_special,
        spaces_special=request.rules.spaces_special,
    )
