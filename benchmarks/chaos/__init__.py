"""Breaks a running cluster on purpose, and compares every token with the undisturbed run."""
