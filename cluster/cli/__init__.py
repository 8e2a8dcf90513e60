"""The `milliways` command."""
