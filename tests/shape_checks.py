"""Checks the shape annotations of functions when tests call them, and no other annotation.

`int` where `float` is declared, or a protocol, is the type checker's business: at run time beartype
is stricter about those than Python's typing rules. Constructors are left out, because JAX rebuilds
its trees of arrays with leaves that are none (partition specs, axis names, None).
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker handed to jaxtyping, which decorates every function with it."""
    if function.__name__ == "__init__":
        return function
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if holds_shape(hint)
    }
    return beartype(function)


def holds_shape(hint: Any) -> bool:
    """Whether `hint` is a shape such as Float[Array, "T D"], or a tuple or union with one."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(holds_shape(part) for part in get_args(hint))
