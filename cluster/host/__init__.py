"""Puts a model, a router and a worker together in one process."""
