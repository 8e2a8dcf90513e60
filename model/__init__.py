"""The model in one process: Grok-1 in JAX, its weights, tokenizer, KV blocks and sampling.

    from milliways.model.checkpoint import Checkpoint
    from milliways.model.model_dir import load_tokenizer, resolve_model_dir

    model_dir = resolve_model_dir("demo")
    with Checkpoint.open(model_dir) as checkpoint:
        tokenizer = load_tokenizer(model_dir, checkpoint.config.vocab_size)
        print(checkpoint.config.num_layers, tokenizer.encode("Welcome to"))

It owns the configuration (`config`), the released files (`checkpoint`), the parameters (`params`),
the forward pass (`decoder`) and its kernels (`ops`), the KV cache (`kv_cache`, `block_pool`), steps
of padded batches (`runner`), sampling, text (`tokenizer`, `detokenizer`), and the demo model
(`demo`).

Invariants:

- It imports no Ray, gRPC or asyncio, and no other package of Milliways.
- On a CPU, a token's logits have the same bits in any batch and with any chunking of the prompt. On
  a GPU, `deterministic` is needed for that.
- A suffix such as `_TD` is the shape of an array; `shapes` lists the letters.
- Faults of the world raise a subclass of `errors.ModelError`; an assertion is a bug of ours.
"""
