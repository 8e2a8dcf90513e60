"""One module for each command of `milliways`: `add_options` declares, `run` does and prints."""
