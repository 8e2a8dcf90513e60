"""Every error the cluster raises for the world's faults.

ClusterError
└── PlacementError         the workers cannot hold the model; says what is needed, there, and short
"""


class ClusterError(Exception):
    """Root of the tree above."""


class PlacementError(ClusterError):
    """The workers cannot hold the model as asked."""
