"""Builds the CPU kernels. pyproject.toml declares the rest of the package."""

import hashlib
from pathlib import Path

import jax.ffi
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("milliways/model/ops/native")


class BuildKernels(build_ext):
    """Removes the older library first: if compiling failed, it would be used in silence."""

    def build_extension(self, ext: Extension) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)


def digest_of_sources() -> str:
    """A digest of names and contents, so that a library can say what it was compiled from."""
    digest = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "milliways.model.ops._kernels",
            sources=sorted(str(path) for path in NATIVE.glob("*.cc")),
            depends=sorted(str(path) for path in NATIVE.glob("*.[hi]*")),
            language="c++",
            define_macros=[("MILLIWAYS_SOURCES", f'"{digest_of_sources()}"')],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                # A product and a sum share one rounding only where the source says so.
                "-ffp-contract=off",
                "-fno-fast-math",
                "-fno-math-errno",
                "-Wno-psabi",
                # As system headers: their warnings are not about our code.
                f"-isystem{jax.ffi.include_dir()}",
            ],
            extra_link_args=["-pthread"],
            # Without a compiler plain JAX computes, which is slower, and a log line says so.
            optional=True,
        )
    ],
)
