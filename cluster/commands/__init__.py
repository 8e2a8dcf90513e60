"""One module for each command of `milliways`: its options, and what it prints."""
