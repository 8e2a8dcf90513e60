"""What programs import: a model in this process, and clients of a served one."""
