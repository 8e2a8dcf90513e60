"""Model configurations: what is read, what is derived, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from milliways.model.config import GROK_1, config_from_dict, ffn_size, load_config
from milliways.model.errors import ModelConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


def tiny(**changes: Any) -> dict[str, Any]:
    return json.loads((GOLDEN / "tiny" / "config.json").read_text()) | changes


def test_directory_without_config_is_grok_1(tmp_path: Path) -> None:
    assert load_config(tmp_path) == GROK_1


def test_extra_keys_are_ignored() -> None:
    assert config_from_dict(tiny(colour="blue")).emb_size == 128


@pytest.mark.parametrize(("emb_size", "widening", "expected"), [(6144, 8, 32768), (128, 8, 688)])
def test_ffn_size_follows_the_reference(emb_size: int, widening: float, expected: int) -> None:
    assert ffn_size(emb_size, widening) == expected


def test_ffn_size_is_derived_where_it_is_not_given() -> None:
    fields = tiny()
    del fields["ffn_size"]
    assert config_from_dict(fields).ffn_size == 688


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("emb_size", 0),
        ("emb_size", -1),
        ("emb_size", 12.5),
        ("emb_size", "128"),
        ("emb_size", True),
        ("emb_size", None),
        ("key_size", 31),
        ("num_q_heads", 5),
        ("num_selected_experts", 9),
        ("eos_token", 512),
        ("pad_token", -1),
        ("embedding_multiplier_scale", float("nan")),
        ("attn_output_multiplier", 0),
        ("output_multiplier_scale", "1"),
        ("emb_size", 10**400),
        ("output_multiplier_scale", 10**400),
        ("num_layers", 10**6),
    ],
)
def test_impossible_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelConfigError, match=field) as caught:
        config_from_dict(tiny(**{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["num_layers", "ffn_size", "output_multiplier_scale"])
def test_missing_field_is_refused_by_name(field: str) -> None:
    fields = tiny()
    del fields[field]
    fields.pop("widening_factor")
    with pytest.raises(ModelConfigError, match=rf"'{field}' = None: missing"):
        config_from_dict(fields)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "nul", '{"emb_size": 1e999}', "[" * 100_000, '{"emb_size": 0}']
)
def test_file_that_is_no_configuration_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelConfigError, match=re.escape(str(path))):
        load_config(tmp_path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelConfigError, match="not JSON"):
        load_config(tmp_path)
