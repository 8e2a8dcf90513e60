"""Checkpoints in the form xAI released Grok-1: read in place, checked, written, summed up."""

from model.checkpoint.layout import TensorRole as TensorRole
from model.checkpoint.layout import TensorSpec as TensorSpec
from model.checkpoint.layout import layers_in_file_order as layers_in_file_order
from model.checkpoint.layout import tensor_shape as tensor_shape
from model.checkpoint.layout import tensor_specs as tensor_specs
from model.checkpoint.pickle_scan import scan as scan
from model.checkpoint.reader import CHECKPOINT_DIR as CHECKPOINT_DIR
from model.checkpoint.reader import Checkpoint as Checkpoint
from model.checkpoint.records import ArrayRecord as ArrayRecord
from model.checkpoint.records import PlainArray as PlainArray
from model.checkpoint.records import QuantizedArray as QuantizedArray
from model.checkpoint.records import TensorRecord as TensorRecord
from model.checkpoint.summary import CheckpointSummary as CheckpointSummary
from model.checkpoint.summary import RoleSummary as RoleSummary
from model.checkpoint.summary import WorkerMemory as WorkerMemory
from model.checkpoint.summary import format_summary as format_summary
from model.checkpoint.summary import kv_bytes_per_token as kv_bytes_per_token
from model.checkpoint.summary import summarize as summarize
from model.checkpoint.summary import to_json as to_json
from model.checkpoint.writer import write_checkpoint as write_checkpoint
from model.checkpoint.writer import write_plain as write_plain
from model.checkpoint.writer import write_quantized as write_quantized
from model.checkpoint.writer import write_sparse_checkpoint as write_sparse_checkpoint
