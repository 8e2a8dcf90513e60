"""Who takes requests under a placement."""

import pytest

from milliways.wire.placement import AttentionRange
from milliways.wire.view import ClusterView, Member, WorkerState, chains_of

FIRST = AttentionRange(first_layer=0, num_layers=2, has_ends=False)
LAST = AttentionRange(first_layer=2, num_layers=2, has_ends=True)
WHOLE = AttentionRange(first_layer=0, num_layers=4, has_ends=True)
NONE = AttentionRange(first_layer=4, num_layers=0, has_ends=False)


def test_each_worker_with_all_of_attention_has_a_router() -> None:
    shards = {"a": WHOLE, "b": NONE, "c": WHOLE}
    assert chains_of(shards, 4) == {"a": ("a",), "c": ("c",)}


def test_a_chain_has_its_router_where_tokens_enter_and_leave() -> None:
    assert chains_of({"b": LAST, "a": FIRST, "c": NONE}, 4) == {"b": ("a", "b")}


@pytest.mark.parametrize("shards", [{}, {"a": FIRST}, {"b": LAST}, {"c": NONE}])
def test_there_is_no_router_before_all_layers_are_there(shards: dict[str, AttentionRange]) -> None:
    assert chains_of(shards, 4) == {}


def view_of(nodes: dict[str, str], **states: WorkerState) -> ClusterView:
    """Workers with all of attention, by node."""
    members = {
        name: Member(
            worker_id=name,
            incarnation=1,
            address="",
            state=states.get(name, WorkerState.READY),
            node_id=node,
        )
        for name, node in nodes.items()
    }
    chains = {name: (name,) for name in nodes}
    return ClusterView(placement_epoch=1, members=members, chains=chains)


def standby_of(view: ClusterView, name: str) -> str:
    return next((member.worker_id for member in view.standbys(name)), "")


def test_each_router_has_another_one_for_its_standby() -> None:
    view = view_of(dict.fromkeys("abcd", "n"))
    assert [standby_of(view, name) for name in "abcd"] == ["b", "c", "d", "a"]
    assert [member.worker_id for member in view.standbys("b")] == ["c", "d", "a"]


def test_a_standby_is_on_another_node_if_there_is_one() -> None:
    view = view_of({"a": "m", "b": "m", "c": "n", "d": "n"})
    assert [standby_of(view, name) for name in "abcd"] == ["c", "d", "a", "b"]


@pytest.mark.parametrize("state", [s for s in WorkerState if s is not WorkerState.READY])
def test_worker_that_takes_no_requests_is_no_standby(state: WorkerState) -> None:
    view = view_of(dict.fromkeys("abc", "n"), b=state)
    assert (standby_of(view, "a"), standby_of(view, "c")) == ("c", "a")
    assert standby_of(view_of({"a": "n", "b": "n"}, b=state), "a") == ""


def test_router_of_a_chain_has_no_standby_and_is_none() -> None:
    view = view_of(dict.fromkeys("ab", "n"))
    chained = ClusterView(placement_epoch=1, members=view.members, chains={"a": ("a", "b")})
    assert [standby_of(chained, name) for name in "ab"] == ["", ""]
