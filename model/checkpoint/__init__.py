"""Checkpoints in the form in which xAI released Grok-1: reads, checks, writes and summarises them.

    from milliways.model.checkpoint import Checkpoint, TensorRole
    from milliways.model.demo import DEMO_DIR

    with Checkpoint.open(DEMO_DIR) as checkpoint:
        weight, scales = checkpoint.expert(layer=0, role=TensorRole.EXPERT_LINEAR, expert_id=3)
        print(weight.shape, scales.dtype, checkpoint.bytes_read)

It owns the layout of the release (`layout`), a scanner that finds arrays in a pickle and executes
nothing (`pickle_scan`), mapped files (`reader`, `file_map`), digests of what was read
(`checked_tensors`), the writer (`writer`), and the figures of `milliways inspect` (`summary`).

Invariants:

- Nothing is ever unpickled, so no code of a file runs.
- Opening a checkpoint reads a few hundred bytes of each file. Weights are read when they are used.
- Arrays that are handed out are read-only views. Each keeps its file mapped.
- A written file has the bytes that Python's pickler would have written.
"""

from milliways.model.checkpoint.checked_tensors import CheckedTensors as CheckedTensors
from milliways.model.checkpoint.checked_tensors import check_unchangeable as check_unchangeable
from milliways.model.checkpoint.checked_tensors import digest_model as digest_model
from milliways.model.checkpoint.checked_tensors import part_names as part_names
from milliways.model.checkpoint.layout import TensorRole as TensorRole
from milliways.model.checkpoint.layout import TensorSpec as TensorSpec
from milliways.model.checkpoint.layout import layers_in_file_order as layers_in_file_order
from milliways.model.checkpoint.layout import tensor_shape as tensor_shape
from milliways.model.checkpoint.layout import tensor_specs as tensor_specs
from milliways.model.checkpoint.pickle_scan import scan as scan
from milliways.model.checkpoint.reader import CHECKPOINT_DIR as CHECKPOINT_DIR
from milliways.model.checkpoint.reader import Checkpoint as Checkpoint
from milliways.model.checkpoint.reader import find_directories as find_directories
from milliways.model.checkpoint.reader import missing_config_hint as missing_config_hint
from milliways.model.checkpoint.records import ArrayRecord as ArrayRecord
from milliways.model.checkpoint.records import PlainArray as PlainArray
from milliways.model.checkpoint.records import QuantizedArray as QuantizedArray
from milliways.model.checkpoint.records import TensorRecord as TensorRecord
from milliways.model.checkpoint.source import TensorSource as TensorSource
from milliways.model.checkpoint.summary import CheckpointSummary as CheckpointSummary
from milliways.model.checkpoint.summary import RoleSummary as RoleSummary
from milliways.model.checkpoint.summary import ShardMemory as ShardMemory
from milliways.model.checkpoint.summary import format_summary as format_summary
from milliways.model.checkpoint.summary import kv_bytes_per_token as kv_bytes_per_token
from milliways.model.checkpoint.summary import summarize as summarize
from milliways.model.checkpoint.summary import to_json as to_json
from milliways.model.checkpoint.writer import write_checkpoint as write_checkpoint
from milliways.model.checkpoint.writer import write_plain as write_plain
from milliways.model.checkpoint.writer import write_quantized as write_quantized
from milliways.model.checkpoint.writer import write_sparse_checkpoint as write_sparse_checkpoint
