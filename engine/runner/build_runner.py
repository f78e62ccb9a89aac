"""Puts a runner together for a device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from halimede.engine.model_input import KVCache
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.decode_graphs import DecodeGraphs, Recorder
from halimede.engine.runner.host_rows import HostRows
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.row_table import RowTable
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.step_queue import StepQueue, make_queue

if TYPE_CHECKING:  # Triton need not be installed
    from halimede.engine.runner.device_rows import DeviceRows


def make_host_runner(
    model: CausalLM, kv_caches: Sequence[KVCache], limits: RowLimits, queue: StepQueue | None = None
) -> ModelRunner:
    """A runner on the CPU, of torch's operations."""
    vocab_size = model.config.vocab_size
    table = RowTable(limits.max_rows, vocab_size)
    rows = HostRows(table.columns, limits, vocab_size)
    queue = queue or make_queue(torch.device("cpu"))
    return ModelRunner(model, kv_caches, table=table, rows=rows, queue=queue)


def make_device_runner(
    model: CausalLM,
    kv_caches: Sequence[KVCache],
    limits: RowLimits,
    rows: "DeviceRows",
    queue: StepQueue,
    graphs: DecodeGraphs | None = None,
) -> ModelRunner:
    """A runner of Triton kernels over rows made for the same limits."""
    table = RowTable(limits.max_rows, model.config.vocab_size)
    return ModelRunner(model, kv_caches, table=table, rows=rows, queue=queue, graphs=graphs)


def make_graphs(
    model: CausalLM,
    kv_caches: Sequence[KVCache],
    rows: "DeviceRows",
    recorder: Recorder,
    sizes: Sequence[int],
    *,
    lazily: bool = False,
) -> DecodeGraphs:
    """The graphs of a model's decode steps over rows and a cache that stay where they are; none recorded."""

    def logits(num_rows: int) -> torch.Tensor:
        return model.compute_logits(model(rows.decode_input(num_rows), kv_caches))

    return DecodeGraphs(recorder, rows.clear, logits, sizes, lazily=lazily)
