"""Ends this process after a bug of ours: its state may be wrong, so it must not answer."""

import logging
import os

logger = logging.getLogger(__name__)

EXIT_FAULT = 70


def end_process(error: BaseException) -> None:
    """Logs the error and ends the process at once; others notice, and replace it."""
    logger.critical("a bug; the process ends", exc_info=error)
    os._exit(EXIT_FAULT)
