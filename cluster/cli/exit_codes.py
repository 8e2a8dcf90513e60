"""The exit codes of the `milliways` command."""

import sys

from milliways.model.errors import InvalidRequestError, ModelError
from milliways.wire.errors import ClusterError

UNUSABLE = 1
BAD_REQUEST = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

# Errors that are nobody's bug; the message says all.
EXPECTED = (ModelError, ClusterError, OSError)


def report(error: Exception) -> int:
    """Prints an expected error; returns the exit code for it."""
    print(f"milliways: {error}", file=sys.stderr)
    return BAD_REQUEST if isinstance(error, InvalidRequestError) else UNUSABLE
