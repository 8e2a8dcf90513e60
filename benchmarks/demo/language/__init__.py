"""The demo model's language: an engine, the facts of its universe, and six kinds of text."""
