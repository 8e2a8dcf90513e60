"""The programs that run in contestants' processes.

Most speak `line_protocol`. `run_transformers` and `run_vllm` run by path under another engine's
Python interpreter, and import nothing of Milliways but `line_protocol`.
"""
