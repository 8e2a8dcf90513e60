"""The rules of the demo model's language: an engine, facts, and six kinds of text."""
