"""How fast we are: beside other engines, and beside what the machine allows.

One run of `milliways bench` goes like this:

1. The model is made (`bench_model`) or given; a copy in llama.cpp's format is written beside it
   (`gguf_model`).
2. Every contestant starts in a process of its own, and is put to sleep (`contestant`).
3. Round after round, each workload is given to one contestant after the other (`rounds`), and the
   machine's own limits are read (`machine`).
4. Medians, ratios and the share of the limits that was reached are printed (`table`).
"""
