"""One process with several devices, in plain JAX: the tokens of the compiled kernels on one."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.errors import MeshError
from milliways.model.ops import NativeOps
from milliways.model.params import DeviceLoader, load_model
from milliways.model.runner import CacheSize, ScheduledTokens, make_mesh_runner
from milliways.model.sharding import ShardingRules, check_mesh, make_mesh
from tests.reference import small_config
from tests.runners import in_eights, load, logits_of, runner_of

NUM_DECODED = 8


@pytest.mark.parametrize(
    ("name", "num_tensor", "num_expert"),
    [("tiny", 2, 4), ("tiny", 1, 8), ("mini8", 8, 1)],
)
def test_mesh_gives_the_tokens_of_one_device(
    golden_dir: Path, name: str, num_tensor: int, num_expert: int
) -> None:
    single = runner_of(load(golden_dir / name))
    with Checkpoint.open(golden_dir / name) as checkpoint:
        host_params = load_model(checkpoint, DeviceLoader(place=lambda array: array))
        mesh_runner = make_mesh_runner(
            Decoder(config=checkpoint.config, dtype=jnp.dtype("float32")),
            host_params,
            CacheSize(num_blocks=8, max_slots=8),
            make_mesh(num_tensor, num_expert),
            ShardingRules(),
        )
    with np.load(golden_dir / name / "golden" / "forward_f32.npz") as file:
        recorded = dict(file)
    for prompt in ("p0", "p1", "p3", "p4", "p2"):
        tokens = recorded[f"{prompt}_tokens"].tolist()
        chunks = in_eights(len(tokens))
        logits = logits_of(mesh_runner, tokens, chunks)
        np.testing.assert_allclose(logits, recorded[f"{prompt}_logits"], rtol=0, atol=2e-3)
        assert (logits.argmax(1) == logits_of(single, tokens, chunks).argmax(1)).all()
    for _ in range(NUM_DECODED):
        step = ScheduledTokens(
            token_ids=[int(logits[-1].argmax())],
            start_position=len(tokens),
            block_table=range(8),
        )
        tokens.append(step.token_ids[0])
        logits = mesh_runner.compute_logits([step])
        assert logits[0].argmax() == single.compute_logits([step])[0].argmax()


def test_axis_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MeshError, match="num_experts = 5 does not divide over 4 devices"):
        check_mesh(small_config(), make_mesh(1, 4), ShardingRules(heads=None, ffn=None))


def test_heads_follow_the_key_value_heads() -> None:
    with pytest.raises(MeshError, match="num_kv_heads = 3 does not divide over 2"):
        check_mesh(small_config(), make_mesh(2, 1), ShardingRules())


def test_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(MeshError, match="needs 1000 devices"):
        make_mesh(1000, 1)


def test_rule_naming_an_unknown_mesh_axis_is_refused() -> None:
    with pytest.raises(MeshError, match="'elsewhere'"):
        check_mesh(small_config(), make_mesh(1, 1), ShardingRules(ffn="elsewhere"))


def test_two_cuts_of_one_array_over_one_axis_are_refused() -> None:
    with pytest.raises(MeshError, match="ffn and experts"):
        ShardingRules(ffn="expert", experts="expert")


def test_decoder_is_usable_as_a_static_argument(golden_dir: Path) -> None:
    decoder, _ = load(golden_dir / "tiny")
    same = Decoder(config=decoder.config, dtype=decoder.dtype, ops=NativeOps())
    assert hash(decoder) == hash(same) and decoder == same
