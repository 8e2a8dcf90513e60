"""Trains the demo model; nothing here is imported when serving."""
