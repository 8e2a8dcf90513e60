"""The settings of a cluster.

    from milliways.cluster.settings.config import ClusterConfig, config_from_tree

    config = ClusterConfig()                                  # the demo model on three workers
    config = config_from_tree({"workers": {"count": 5}})      # from TOML or Serve's arguments

This package owns the settings' names, defaults and limits, and nothing that acts on them.

Invariants: a `ClusterConfig` that exists is valid, and it never changes.
"""
