"""Decoder layers recorded once and replayed without Python, for decoding on a CPU: what graphs are to a GPU.

A decoding step of a small model is some 50 operations in each layer, most of them tiny. Called from Python
they take as long as reading the weights: from layer to layer the weights push interpreter and dispatcher out
of the processor's caches. A few layers in a row are traced into a TorchScript function whose inputs are
everything that changes, weights included, so that one recording serves all layers and takes little time.

A recording fixes what Python decided on the way: `_Form` is everything that such decisions hang on. Sizes are
not fixed, but for one row and for few rows, which products and norms treat differently.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from halimede.engine.model_input import KVCache
from halimede.kernels.attention_plan import AttentionPlan, DecodeBatch, DecodeScratch, HeadBags
from halimede.kernels.matmul import plain_products
from halimede.kernels.norm import FEW_ROWS
from halimede.kernels.rotary import RotaryFactors

logger = logging.getLogger(__name__)

# Layers in one recording. Making one takes 40 ms a layer when it is first needed, calling it some 20 us: with
# one row three layers save a thirtieth of a step and six no more; with several rows it does not show.
_MOST_LAYERS = {"one": 3, "few": 1, "many": 1}

_BatchForms = tuple[tuple[bool, bool], ...]
_Replay = Callable[..., torch.Tensor]
_Slot = tuple[dict[str, Any], str]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a step gives to all layers with the same attention window."""

    rope: RotaryFactors
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class _Form:
    """size: "one" row, "few" or "many". batches: those of each kind's plan. kinds: of each layer."""

    size: str
    batches: tuple[_BatchForms, ...]
    kinds: tuple[int, ...]


class LayerTraces:
    """Recordings of a decoder's layers, all of one structure, made when a step first needs them.

    layers: the decoder's. kinds: for each, the place of its kind in what `run` is given. Where a recording
    cannot be made (a torch without tracing) layers run as they are.
    """

    def __init__(self, layers: nn.ModuleList, kinds: Sequence[int]) -> None:
        self._weights = [[owner[name] for owner, name in _weight_slots(layer)] for layer in layers]
        self._layers, self._kinds = layers, tuple(kinds)
        self._traces: dict[_Form, _Replay | None] = {}

    def run(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        kinds: Sequence[LayerKind],
        kv_caches: Sequence[KVCache],
        kv_rows: torch.Tensor,
    ) -> torch.Tensor:
        """All layers, each as DecoderLayer.forward would; the plans have no prefill rows."""
        rows = hidden_states.shape[0]
        size = "one" if rows == 1 else "few" if rows <= FEW_ROWS else "many"
        batches = tuple(_forms_of(kind.plan) for kind in kinds)
        shared = [tensor for kind in kinds for tensor in (*kind.rope, *_tensors_of(kind.plan))]
        with self._replaying(rows):
            for first, last in _groups(len(self._layers), _MOST_LAYERS[size]):
                form = _Form(size, batches, self._kinds[first:last])
                caches = [cache for pair in kv_caches[first:last] for cache in pair]
                weights = [weight for layer in self._weights[first:last] for weight in layer]
                inputs = (hidden_states, residual, kv_rows, *shared, *caches, *weights)
                if form not in self._traces:
                    self._traces[form] = self._record(first, form, inputs)
                replay = self._traces[form]
                if replay is None:
                    hidden_states = self._run_layers(
                        first, hidden_states, residual, [kinds[k] for k in form.kinds], kv_caches, kv_rows
                    )
                else:
                    hidden_states = replay(*inputs)
        return hidden_states

    def _run_layers(
        self,
        first: int,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        kinds: Sequence[LayerKind],
        kv_caches: Sequence[KVCache] | Mapping[int, KVCache],
        kv_rows: torch.Tensor,
    ) -> torch.Tensor:
        """As many layers as there are kinds, from `first` on. kv_caches: of all layers."""
        for index, kind in enumerate(kinds, start=first):
            hidden_states = self._layers[index](
                hidden_states, residual, kind.rope, kv_caches[index], kv_rows, kind.plan
            )
        return hidden_states

    @staticmethod
    @contextmanager
    def _replaying(rows: int) -> Iterator[None]:
        """What must hold around a replay for steps of so many rows: what a recording cannot switch itself.

        TorchScript's optimizing executor, which watches the shapes of each call, costs 2 ms a step here.
        """
        unwatched = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        with unwatched, plain_products() if rows == 1 else nullcontext():
            yield

    def _record(self, first: int, form: _Form, inputs: tuple[torch.Tensor, ...]) -> _Replay | None:
        """The layers from `first` on that the form has, as a function of the inputs that `run` gives it."""
        count = len(form.kinds)
        slots = [_weight_slots(layer) for layer in self._layers[first : first + count]]

        def run(hidden_states: torch.Tensor, residual: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            rest = iter(tensors)
            kv_rows = next(rest)
            kinds = [_kind_from(rest, batches) for batches in form.batches]
            caches = {index: (next(rest), next(rest)) for index in range(first, first + count)}
            with ExitStack() as stack:
                for layer_slots in slots:
                    stack.enter_context(_weights_replaced(layer_slots, [next(rest) for _ in layer_slots]))
                return self._run_layers(
                    first, hidden_states, residual, [kinds[k] for k in form.kinds], caches, kv_rows
                )

        # Recording runs the layers, which must not change what the step's own run starts from.
        examples = (inputs[0].clone(), inputs[1].clone(), *inputs[2:])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that decisions are fixed, and that tracing is an old way
                traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                    run, examples, check_trace=False
                )
            return _simplified(traced)
        except (AttributeError, RuntimeError) as error:
            logger.warning("decoding runs at the speed of Python: recording a layer failed: %s", error)
            return None


def _simplified(traced: Any) -> _Replay:
    """A recording without the tensors that it makes of every size it reads: an eighth of its operations.

    Shapes must be forgotten first: those of the examples would be taken for the only ones.
    """
    graph = traced.graph
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_erase_shape_information(graph)
    torch._C._jit_pass_peephole(graph, True)  # True: not by shapes
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_dce(graph)
    replay: _Replay = traced
    return replay


def _groups(num_layers: int, most: int) -> Iterator[tuple[int, int]]:
    """Layers first .. last - 1 of groups of at most `most`, as equal as can be: few sizes, few recordings."""
    count = -(-num_layers // most)
    bounds = [num_layers * i // count for i in range(count + 1)] if count else []
    return pairwise(bounds)


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


def _forms_of(plan: AttentionPlan) -> _BatchForms:
    return tuple((batch.tokens is not None, batch.mask is not None) for batch in plan.decode)


def _tensors_of(plan: AttentionPlan) -> list[torch.Tensor]:
    """The tensors of a plan for decoding in a row; _kind_from puts them together again."""
    scratch = plan.scratch
    found: list[torch.Tensor | None] = [scratch.k, scratch.v, scratch.wide_k, scratch.wide_v]
    for batch in plan.decode:
        found += [batch.tokens, batch.cache_rows, batch.mask]
        if batch.bags is not None:
            found += [batch.bags.rows, batch.bags.starts]
    return [tensor for tensor in found if tensor is not None]


def _kind_from(tensors: Iterator[torch.Tensor], batch_forms: _BatchForms) -> LayerKind:
    def take() -> torch.Tensor:
        return next(tensors)

    rope = take(), take()
    scratch = DecodeScratch(take(), take(), take(), take())
    batches = tuple(
        DecodeBatch(
            tokens=take() if scattered else None,
            cache_rows=take(),
            mask=take() if masked else None,
            bags=HeadBags(take(), take()) if masked else None,
        )
        for scattered, masked in batch_forms
    )
    return LayerKind(rope, AttentionPlan(batches, (), scratch))
