"""Fetches parts of the model from workers that hold them, where a file cannot be read."""

import logging
from collections.abc import Sequence
from random import Random

import numpy as np

from milliways.model.checkpoint import TensorSpec
from milliways.wire.errors import UnavailableError
from milliways.wire.placement import ExpertId
from milliways.wire.tls import TlsSettings
from milliways.wire.view import Member
from milliways.workers.servers.parts import fetch_part

logger = logging.getLogger(__name__)

# For one part. The largest of Grok-1 takes 2 s at 100 MB/s.
FETCH_TIMEOUT_S = 120.0


class PeerParts:
    """The workers that may have a part. They are asked in a random order, to spread the work."""

    def __init__(self, peers: Sequence[Member], tls: TlsSettings, random: Random) -> None:
        self._peers = peers
        self._tls = tls
        self._random = random

    def fetch(self, spec: TensorSpec, expert_id: int | None) -> list[np.ndarray]:
        """The arrays of a part from the first worker that gives them; empty if nobody does."""
        holders = [peer for peer in self._peers if _holds(peer, spec, expert_id)]
        for peer in self._random.sample(holders, len(holders)):
            try:
                arrays = fetch_part(peer.address, self._tls, spec.name, expert_id, FETCH_TIMEOUT_S)
            except UnavailableError as error:
                logger.warning("%s: %s", peer.worker_id, error)
                continue
            logger.info("%s came from %s", spec.name, peer.worker_id)
            return arrays
        return []


def _holds(peer: Member, spec: TensorSpec, expert_id: int | None) -> bool:
    if spec.layer is None:
        return peer.has_ends
    if expert_id is not None:
        return ExpertId(spec.layer, expert_id) in peer.experts
    return peer.first_layer <= spec.layer < peer.first_layer + peer.num_layers
