"""How the demo model was made: its language and its training."""
