"""Options and parsers that several commands use."""

import argparse

from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import DEMO_NAME

DTYPE_NAMES = ("bfloat16", "float32")
ACTIVATION_NAMES = ("exact", "int8")
RESIDENCE_NAMES = ("loaded", "mapped")


def add_model_options(parser: argparse.ArgumentParser, default_model: str | None) -> None:
    """Declares the options of the model and of its computation."""
    parser.add_argument(
        "--model",
        metavar=f"DIR|{DEMO_NAME}",
        default=default_model,
        required=default_model is None,
        help="model directory (ckpt-0/, config.json, tokenizer.model)"
        + (" [%(default)s]" if default_model else ""),
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="dtype of activations and KV cache [%(default)s]",
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATION_NAMES,
        default="exact",
        help="what is multiplied with int8 weights: exact activations, or int8 ones, rounded in"
        " blocks of 32, which are faster and less precise [%(default)s]",
    )
    parser.add_argument(
        "--experts",
        choices=RESIDENCE_NAMES,
        default="loaded",
        help="where experts are: loaded into memory, or mapped from their files, for models that"
        " are larger than memory [%(default)s]",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, give a token the same bits in any batch, which is slower; on a CPU they"
        " are always the same",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="number of threads that compute on a CPU [one for each usable processor]",
    )


def parse_token_ids(text: str) -> tuple[int, ...]:
    """Parses token ids such as "1,2,3".

    Raises:
        InvalidRequestError: a part between the commas is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequestError("tokens", text, "whole numbers separated by commas") from None
