"""Builds the CPU kernels. What the package is otherwise stands in pyproject.toml."""

from pathlib import Path

import jax.ffi
from setuptools import Extension, setup

NATIVE = Path("model/ops/native")

setup(
    ext_modules=[
        Extension(
            "model.ops._kernels",
            sources=sorted(str(path) for path in NATIVE.glob("*.cc")),
            depends=sorted(str(path) for path in NATIVE.glob("*.[hi]*")),
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                # A product and a sum become one rounding where the text says so, and nowhere else.
                "-ffp-contract=off",
                "-fno-math-errno",
                "-Wno-psabi",
                # As system headers, whose warnings are not ours.
                f"-isystem{jax.ffi.include_dir()}",
            ],
            extra_link_args=["-pthread"],
            # Without a compiler plain JAX computes: slower, and it says so.
            optional=True,
        )
    ]
)
