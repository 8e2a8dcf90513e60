"""Who takes requests under a placement."""

import pytest

from cluster.placement import AttentionShard
from cluster.view import chains_of

FIRST = AttentionShard(first_layer=0, num_layers=2, has_ends=False)
LAST = AttentionShard(first_layer=2, num_layers=2, has_ends=True)
WHOLE = AttentionShard(first_layer=0, num_layers=4, has_ends=True)
NONE = AttentionShard(first_layer=4, num_layers=0, has_ends=False)


def test_each_worker_with_all_of_attention_has_a_router() -> None:
    shards = {"a": WHOLE, "b": NONE, "c": WHOLE}
    assert chains_of(shards, 4) == {"a": ("a",), "c": ("c",)}


def test_a_chain_has_its_router_where_tokens_enter_and_leave() -> None:
    assert chains_of({"b": LAST, "a": FIRST, "c": NONE}, 4) == {"b": ("a", "b")}


@pytest.mark.parametrize("shards", [{}, {"a": FIRST}, {"b": LAST}, {"c": NONE}])
def test_there_is_no_router_before_all_layers_are_there(shards: dict[str, AttentionShard]) -> None:
    assert chains_of(shards, 4) == {}
