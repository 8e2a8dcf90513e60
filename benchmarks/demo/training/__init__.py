"""Trains the demo model. Nothing here is imported when serving."""
