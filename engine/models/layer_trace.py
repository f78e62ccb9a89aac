"""Decoder layers recorded once and replayed without Python, for decoding on a CPU: what graphs are to a GPU.

A decoding step of a small model is some 50 operations in each layer, most of them tiny. Called from Python
they take as long as reading the weights: from layer to layer the weights push interpreter and dispatcher out
of the processor's caches. One layer is traced into a TorchScript function whose inputs are everything that
changes, weights included, so that one recording serves all layers and takes tens of milliseconds.

A recording fixes what Python decided on the way: `_Form` is everything that such decisions hang on. Sizes are
not fixed, but for one row and for few rows, which products and norms treat differently.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from halimede.engine.model_input import KVCache
from halimede.kernels.attention_plan import AttentionPlan, DecodeBatch
from halimede.kernels.matmul import plain_products
from halimede.kernels.norm import FEW_ROWS
from halimede.kernels.rotary import RotaryFactors

logger = logging.getLogger(__name__)

_Form = tuple[str, tuple[tuple[bool, bool], ...]]
_Replay = Callable[..., torch.Tensor]
_Slot = tuple[dict[str, Any], str]


class LayerTraces:
    """Recordings of a decoder's layers, all of one structure, made when a step first needs them.

    layers: the decoder's. Where a recording cannot be made (a torch without tracing) layers run as they are.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._weights = [[owner[name] for owner, name in _weight_slots(layer)] for layer in layers]
        self._layers = layers
        self._traces: dict[_Form, _Replay | None] = {}

    def run(
        self,
        index: int,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        rope: RotaryFactors,
        kv_cache: KVCache,
        kv_rows: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Layer `index` as DecoderLayer.forward would, inside `replaying`; the plan has no prefill rows."""
        form = _form_of(hidden_states.shape[0], plan)
        inputs = (hidden_states, residual, *rope, *kv_cache, kv_rows, *plan.scratch, *_tensors_of(plan))
        if form not in self._traces:
            self._traces[form] = self._record(form, inputs)
        replay = self._traces[form]
        if replay is None:
            output: torch.Tensor = self._layers[index](hidden_states, residual, rope, kv_cache, kv_rows, plan)
            return output
        return replay(*inputs, *self._weights[index])

    @contextmanager
    def replaying(self, rows: int) -> Iterator[None]:
        """What must hold around `run` for steps of so many rows: what a recording cannot switch itself.

        TorchScript's optimizing executor, which watches the shapes of each call, costs 2 ms a step here.
        """
        unwatched = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        with unwatched, plain_products() if rows == 1 else nullcontext():
            yield

    def _record(self, form: _Form, inputs: tuple[torch.Tensor, ...]) -> _Replay | None:
        layer = self._layers[0]
        slots = _weight_slots(layer)

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            hidden_states, residual, own, swapped, k_cache, v_cache, kv_rows, k, v, *more = tensors
            rest = iter(more)
            plan = AttentionPlan(_batches_from(rest, form), (), (k, v))
            with _weights_replaced(slots, list(rest)):
                output: torch.Tensor = layer(
                    hidden_states, residual, (own, swapped), (k_cache, v_cache), kv_rows, plan
                )
            return output

        # Recording runs the layer, which must not change what the step's own run starts from.
        examples = (inputs[0].clone(), inputs[1].clone(), *inputs[2:], *self._weights[0])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that decisions are fixed, and that tracing is an old way
                traced: _Replay = torch.jit.trace(  # type: ignore[no-untyped-call]
                    run, examples, check_trace=False
                )
            return traced
        except (AttributeError, RuntimeError) as error:
            logger.warning("decoding runs at the speed of Python: recording a layer failed: %s", error)
            return None


def _weight_slots(layer: nn.Module) -> list[_Slot]:
    """Where a layer keeps its parameters and buffers."""
    owners = (owner for module in layer.modules() for owner in (module._parameters, module._buffers))
    return [(owner, name) for owner in owners for name, tensor in owner.items() if tensor is not None]


@contextmanager
def _weights_replaced(slots: list[_Slot], tensors: list[torch.Tensor]) -> Iterator[None]:
    """The layer with other tensors for weights. (torch.func.functional_call refuses to be traced.)"""
    before = [owner[name] for owner, name in slots]
    try:
        for (owner, name), tensor in zip(slots, tensors, strict=True):
            owner[name] = tensor
        yield
    finally:
        for (owner, name), tensor in zip(slots, before, strict=True):
            owner[name] = tensor


def _form_of(rows: int, plan: AttentionPlan) -> _Form:
    size = "one" if rows == 1 else "few" if rows <= FEW_ROWS else "many"
    return size, tuple((batch.tokens is not None, batch.mask is not None) for batch in plan.decode)


def _tensors_of(plan: AttentionPlan) -> list[torch.Tensor]:
    """The tensors of the plan's batches in a row; _batches_from puts them together again."""
    fields = ((batch.tokens, batch.cache_rows, batch.mask) for batch in plan.decode)
    return [tensor for batch in fields for tensor in batch if tensor is not None]


def _batches_from(tensors: Iterator[torch.Tensor], form: _Form) -> tuple[DecodeBatch, ...]:
    return tuple(
        DecodeBatch(next(tensors) if scattered else None, next(tensors), next(tensors) if masked else None)
        for scattered, masked in form[1]
    )
