"""Checkpoints in the form xAI released Grok-1: read in place, checked, written, summed up."""

from milliways.model.checkpoint.layout import TensorRole as TensorRole
from milliways.model.checkpoint.layout import TensorSpec as TensorSpec
from milliways.model.checkpoint.layout import layers_in_file_order as layers_in_file_order
from milliways.model.checkpoint.layout import tensor_shape as tensor_shape
from milliways.model.checkpoint.layout import tensor_specs as tensor_specs
from milliways.model.checkpoint.pickle_scan import scan as scan
from milliways.model.checkpoint.reader import CHECKPOINT_DIR as CHECKPOINT_DIR
from milliways.model.checkpoint.reader import Checkpoint as Checkpoint
from milliways.model.checkpoint.records import ArrayRecord as ArrayRecord
from milliways.model.checkpoint.records import PlainArray as PlainArray
from milliways.model.checkpoint.records import QuantizedArray as QuantizedArray
from milliways.model.checkpoint.records import TensorRecord as TensorRecord
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
