"""Which of a Ray cluster's resources are missing for a process, for people."""

from collections.abc import Mapping, Sequence

Amounts = Mapping[str, float]


def missing_of(wanted: Amounts, nodes: Sequence[Amounts], free: Amounts) -> str:
    """Why a process does not run yet that takes `wanted` of one node.

    `free` is what all nodes together have left.
    """
    text = f"a node with {_listed(wanted)}"
    if not nodes:
        return f"{text} (no node is there)"
    if any(_has(node, wanted) for node in nodes):
        short = [name for name, amount in wanted.items() if free.get(name, 0.0) < amount]
        if not short:
            return "its process to start"
        totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in short}
        taken = [f"{free.get(name, 0.0):g} of {totals[name]:g} {name}" for name in short]
        return f"{text} free (free are {', '.join(taken)})"
    most = {name: max(node.get(name, 0.0) for node in nodes) for name in wanted}
    short = [name for name, amount in wanted.items() if most[name] < amount]
    if not short:
        return f"{text} (no node has all of it)"
    return f"{text} (the largest has {_listed({name: most[name] for name in short})})"


def _has(node: Amounts, wanted: Amounts) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in wanted.items())


def _listed(amounts: Amounts) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())
