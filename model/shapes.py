"""The legend of shape suffixes. A suffix has one letter for each axis, in order.

T  tokens of one step, of all its sequences            B  slots (sequences of a step)
S  positions of a sequence in the cache                D  model width (emb_size)
F  expert hidden width (ffn_size)                      E  experts
A  experts per token (num_selected_experts)            H  query heads
R  key/value heads                                     K  width of a head (key_size)
V  vocabulary                                          L  layers
N  KV blocks                                           P  positions per KV block
G  scale rows of a quantised matrix                    M  block-table entries of a sequence

For example, `hidden_TD` has the shape [tokens, model width]. A matrix has the axes [in, out], as in
the release.
"""
