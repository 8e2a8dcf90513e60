"""Which tensor lies in which file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from milliways.model.checkpoint import TensorRole, layers_in_file_order, tensor_specs
from milliways.model.checkpoint.layout import scales_fit
from milliways.model.config import GROK_1, load_config

GOLDEN = Path(__file__).parents[1] / "golden"


def test_grok_1_has_770_files() -> None:
    specs = tensor_specs(GROK_1)
    assert len(specs) == 770
    assert [spec.index for spec in specs] == list(range(770))
    assert specs[769].file_name == "tensor00769_000"


def test_layers_sort_as_strings() -> None:
    assert layers_in_file_order(12) == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert tensor_specs(GROK_1)[2 + 12 * 2].name == "transformer/decoder_layer_10/moe/linear/w"
    assert tensor_specs(GROK_1)[769].name == "transformer/decoder_layer_9/router/w"


@pytest.mark.parametrize("name", ["tiny", "mini8"])
def test_layout_is_the_one_the_reference_wrote(name: str) -> None:
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text(encoding="utf-8"))
    specs = tensor_specs(load_config(GOLDEN / name))
    expected = [
        (entry["file"], entry["name"], tuple(entry["shape"]), entry["dtype"] == "int8")
        for entry in manifest
    ]
    assert expected == [
        (spec.file_name, f"params/{spec.name}", spec.shape, spec.quantized) for spec in specs
    ]


def test_shapes_of_grok_1_are_those_of_the_release() -> None:
    by_role = {spec.role: spec.shape for spec in tensor_specs(GROK_1)}
    assert by_role[TensorRole.EMBEDDING] == (131072, 6144)
    assert by_role[TensorRole.EXPERT_LINEAR] == (8, 6144, 32768)
    assert by_role[TensorRole.EXPERT_LINEAR_1] == (8, 32768, 6144)
    assert by_role[TensorRole.KEY] == (6144, 1024)
    assert by_role[TensorRole.GATE] == (6144, 8)
    assert by_role[TensorRole.POST_MOE_NORM] == (6144,)


def test_query_width_need_not_be_the_model_width() -> None:
    config = replace(GROK_1, num_q_heads=16)
    by_role = {spec.role: spec.shape for spec in tensor_specs(config)}
    assert by_role[TensorRole.QUERY] == (6144, 2048)
    assert by_role[TensorRole.ATTENTION_OUT] == (2048, 6144)


@pytest.mark.parametrize(
    ("scales_shape", "fit"),
    [
        ((8, 1, 6), True),
        ((8, 4, 6), True),
        ((8, 12, 6), True),
        ((8, 5, 6), False),
        ((8, 24, 6), False),
        ((8, 0, 6), False),
        ((8, 1, 5), False),
        ((7, 1, 6), False),
        ((1, 6), False),
        ((), False),
    ],
)
def test_scale_rows_must_divide_the_rows_of_the_weights(
    scales_shape: tuple[int, ...], fit: bool
) -> None:
    assert scales_fit((8, 12, 6), scales_shape) is fit
