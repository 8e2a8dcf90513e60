"""Serves mixture-of-experts language models on a cluster."""
