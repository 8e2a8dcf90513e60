"""Options and parsers that several commands share."""

import argparse

from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import DEMO_NAME

DTYPE_NAMES = ("bfloat16", "float32")
ACTIVATION_NAMES = ("exact", "int8")
RESIDENCE_NAMES = ("loaded", "mapped")


def add_model_options(parser: argparse.ArgumentParser, default_model: str | None) -> None:
    """The model, and how it is computed."""
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
        help="what meets the int8 weights: activations as they are, or rounded to int8 in blocks"
        " of 32, faster and coarser [%(default)s]",
    )
    parser.add_argument(
        "--experts",
        choices=RESIDENCE_NAMES,
        default="loaded",
        help="copied into memory, or left in their files for models larger than memory"
        " [%(default)s]",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, keep a token's bits in any batch, at a price; on a CPU they always are",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that compute on a CPU [all that may be used]"
    )


def parse_token_ids(text: str) -> tuple[int, ...]:
    """Token ids from "1,2,3".

    Raises:
        InvalidRequestError: something between the commas is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequestError("tokens", text, "whole numbers separated by commas") from None
