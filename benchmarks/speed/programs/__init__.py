"""What runs in a contestant's process: one program each, all speaking `line_protocol`.

Those of other engines run under those engines' own Python, by path, and import nothing of ours but
their neighbour.
"""
