"""The suffix on a name is its shape, one letter per axis, in order.

T  tokens of one step, of any sequences, flattened     B  slots (sequences of a step)
S  positions of a sequence in the cache                D  model width (emb_size)
F  expert hidden width (ffn_size)                      E  experts
A  experts per token (num_selected_experts)            H  query heads
R  key/value heads                                     K  width of a head (key_size)
V  vocabulary                                          L  layers
N  KV blocks                                           P  positions per KV block
G  scale rows of a quantised matrix                    M  block-table entries of a sequence

`hidden_TD`, `expert_ids_TA`, `keys_NPRK` read accordingly. A matrix is stored as released:
[in, out].
"""
