"""A router's connections to workers."""
