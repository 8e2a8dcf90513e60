"""Serves mixture-of-experts language models.

    from milliways import LLM, Client, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM("demo") as llm:
        print(llm.generate(["Welcome to"], params)[0].text)
    with Client("127.0.0.1:50051") as client:
        print(client.generate(["Welcome to"], params)[0].text)

The names are loaded when they are first used, so that `import milliways` costs nothing. docs/api.md
describes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milliways.api.client import AsyncClient, Client, TlsSettings
    from milliways.api.llm import LLM
    from milliways.api.sampling import SamplingParams

    __version__: str

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "TlsSettings", "__version__"]

_MODULES = {
    "LLM": "milliways.api.llm",
    "AsyncClient": "milliways.api.client",
    "Client": "milliways.api.client",
    "SamplingParams": "milliways.api.sampling",
    "TlsSettings": "milliways.api.client",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        # Here, because it takes longer to import than everything above.
        from importlib.metadata import version

        return version("milliways")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
