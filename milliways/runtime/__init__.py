"""Time, tasks and threads: how decisions run, in production and in simulation."""
