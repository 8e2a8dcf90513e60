"""Sequences: requests, the scheduler, the step loop, stop rules, streaming. No arrays here."""
