"""Settings of a cluster that do not go together."""

import pytest

from cluster.config import config_from_tree
from cluster.errors import ConfigError


def test_copies_of_blocks_are_off_and_take_workers_with_all_layers() -> None:
    assert not config_from_tree({}).workers.kv_standby
    for attention in ("auto", "replicated"):
        tree = {"workers": {"kv_standby": True, "attention": attention}}
        assert config_from_tree(tree).workers.kv_standby
    with pytest.raises(ConfigError) as caught:
        config_from_tree({"workers": {"kv_standby": True, "attention": "layers"}})
    assert (caught.value.field, caught.value.value) == ("workers.kv_standby", True)
