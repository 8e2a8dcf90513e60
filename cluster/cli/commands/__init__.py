"""One module for each command of `milliways`: `add_options` declares options, `run` executes."""
