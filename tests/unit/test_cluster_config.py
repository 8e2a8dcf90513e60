"""Settings of a cluster that do not go together."""

import pytest

from milliways.cluster.settings.config import config_from_tree
from milliways.wire.errors import ConfigError


def test_copies_of_blocks_are_off_and_take_workers_with_all_layers() -> None:
    assert not config_from_tree({}).workers.kv_standby
    for attention in ("auto", "replicated"):
        tree = {"workers": {"kv_standby": True, "attention": attention}}
        assert config_from_tree(tree).workers.kv_standby
    with pytest.raises(ConfigError) as caught:
        config_from_tree({"workers": {"kv_standby": True, "attention": "layers"}})
    assert (caught.value.field, caught.value.value) == ("workers.kv_standby", True)


def test_workers_for_experts_only_ask_for_resources_of_their_own() -> None:
    tree = {
        "workers": {
            "count": 3,
            "resources": {"milliways_worker": 1},
            "experts_only": 1,
            "experts_only_resources": {"milliways_expert": 1},
        }
    }
    workers = config_from_tree(tree).workers
    asked = [dict(workers.resources_of(number)) for number in range(3)]
    assert asked == [{"milliways_expert": 1}, {"milliways_worker": 1}, {"milliways_worker": 1}]
    tree["workers"]["experts_only"] = 3
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree)
    assert (caught.value.field, caught.value.value) == ("workers.experts_only", 3)
