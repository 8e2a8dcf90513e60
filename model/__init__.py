"""Arrays: Grok-1 in JAX, its weights, tokenizer, KV blocks, sampling. No Ray, gRPC, asyncio."""
