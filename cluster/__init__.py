"""Placement, membership, configuration, and the composition roots that put everything together."""
