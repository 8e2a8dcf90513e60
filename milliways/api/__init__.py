"""What programs import: a model in this process, and clients of a served one.

    from milliways import LLM, SamplingParams

    with LLM("demo") as llm:
        (result,) = llm.generate(["Welcome to"], SamplingParams(temperature=0, max_tokens=8))
        print(result.text)

It owns the public classes: `LLM` (`llm.py`), `Client` and `AsyncClient` (`client.py`), their
parameters (`sampling.py`), results (`results.py`) and errors (`errors.py`). `resuming.py` holds the
only implementation of retries over gRPC.

Invariants:

- `LLM` and `Client` give equal results for equal prompts and parameters.
- `import milliways` imports none of it: a name is loaded when it is first used.
- A client imports neither JAX nor Ray.
"""
