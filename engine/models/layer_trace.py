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
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeGuard

import torch
from torch import nn

from halimede.engine.layers.attention_step import AttentionStep
from halimede.engine.layers.attention_torch import TorchStep
from halimede.engine.model_input import KVCache
from halimede.engine.quant.forms.base import WeightForm
from halimede.kernels.attention_plan import AttentionPlan, DecodeBatch, DecodeScratch, HeadBags
from halimede.kernels.matmul import plain_products
from halimede.kernels.norm import FEW_ROWS

logger = logging.getLogger(__name__)

# Layers in one recording. Making one takes 40 ms a layer when it is first needed, calling it some 20 us: with
# one row three layers save a thirtieth of a step and six no more; with several rows it does not show.
_MOST_LAYERS = {"one": 3, "few": 1, "many": 1}

_BatchForms = tuple[tuple[bool, bool], ...]
_Replay = Callable[..., torch.Tensor]
_Slot = tuple[dict[str, Any], str]


@dataclass(frozen=True, slots=True)
class _Form:
    """size: "one" row, "few" or "many". batches: those of each group's plan. groups: of each layer.
    structure: of the quantized weights of all layers.
    """

    size: str
    batches: tuple[_BatchForms, ...]
    groups: tuple[int, ...]
    structure: Hashable


@dataclass(frozen=True, slots=True)
class _Piece:
    """Layers first .. last - 1, which one recording runs: the group of each, the weights of all in a row.
    structure: of the quantized ones.
    """

    first: int
    last: int
    groups: tuple[int, ...]
    weights: tuple[torch.Tensor, ...]
    structure: Hashable


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor | None,
    residual: torch.Tensor,
    steps: Sequence[AttentionStep],
    kv_caches: Iterable[KVCache],
) -> torch.Tensor | None:
    """The first layers, as many as there are steps, one after the other: see DecoderLayer.forward."""
    for step, layer, kv_cache in zip(steps, layers, kv_caches, strict=False):
        hidden_states = layer(hidden_states, residual, step, kv_cache)
    return hidden_states


def can_replay(steps: Sequence[AttentionStep]) -> TypeGuard[Sequence[TorchStep]]:
    """Whether recordings are for these steps: decoding only."""
    return all(isinstance(step, TorchStep) and not step.plan.prefill for step in steps)


class LayerTraces:
    """Recordings of a decoder's layers, all of one structure, made when a step first needs them.

    layers: the decoder's. groups: for each, the place of its step in what `run` is given. Where a recording
    cannot be made (a torch without tracing) layers run as they are.
    """

    def __init__(self, layers: nn.ModuleList, groups: Sequence[int]) -> None:
        self._layers = list(layers)
        self._pieces = {size: _cut(self._layers, groups, most) for size, most in _MOST_LAYERS.items()}
        self._traces: dict[_Form, _Replay | None] = {}

    def run(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        steps: Sequence[TorchStep],
        kv_caches: Sequence[KVCache],
    ) -> torch.Tensor:
        """All layers, each as DecoderLayer.forward would."""
        rows = hidden_states.shape[0]
        size = "one" if rows == 1 else "few" if rows <= FEW_ROWS else "many"
        batches = tuple(_forms_of(step.plan) for step in steps)
        shared = [tensor for step in steps for tensor in (*step.rope, *_tensors_of(step.plan))]
        with self._replaying(rows):
            for piece in self._pieces[size]:
                form = _Form(size, batches, piece.groups, piece.structure)
                caches = [tensor for cache in kv_caches[piece.first : piece.last] for tensor in cache[:2]]
                inputs = (hidden_states, residual, steps[0].kv_rows, *shared, *caches, *piece.weights)
                layers = self._layers[piece.first : piece.last]
                if form not in self._traces:
                    self._traces[form] = _record(layers, form, inputs)
                replay = self._traces[form] or partial(_run_from_inputs, layers, form)
                hidden_states = replay(*inputs)
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


def _run_from_inputs(layers: Sequence[nn.Module], form: _Form, *tensors: torch.Tensor) -> torch.Tensor:
    """Layers of the form on the tensors that `LayerTraces.run` puts in a row, their weights among them."""
    hidden_states, residual, kv_rows, *more = tensors
    rest = iter(more)
    steps = [_step_from(rest, batches, kv_rows) for batches in form.batches]
    caches = [KVCache(next(rest), next(rest)) for _ in layers]
    with _weights_replaced([slot for layer in layers for slot in _weight_slots(layer)], list(rest)):
        output = run_layers(layers, hidden_states, residual, [steps[g] for g in form.groups], caches)
    assert output is not None, "a piece has layers"
    return output


def _record(layers: Sequence[nn.Module], form: _Form, inputs: tuple[torch.Tensor, ...]) -> _Replay | None:
    """The layers as a recorded function of the inputs; None, and a warning, where that cannot be."""

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return _run_from_inputs(layers, form, *tensors)

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


def _cut(layers: Sequence[nn.Module], groups: Sequence[int], most: int) -> list[_Piece]:
    """Pieces of at most `most` layers, as equal as can be: few sizes, few recordings."""
    count = -(-len(layers) // most)
    bounds = [len(layers) * i // count for i in range(count + 1)] if count else []
    weights = [[owner[name] for owner, name in _weight_slots(layer)] for layer in layers]
    structures = [_structure(layer) for layer in layers]
    return [
        _Piece(
            first,
            last,
            tuple(groups[first:last]),
            tuple(chain(*weights[first:last])),
            tuple(structures[first:last]),
        )
        for first, last in pairwise(bounds)
    ]


def _structure(layer: nn.Module) -> Hashable:
    """What makes a difference between the quantized weights of layers; empty where none are."""
    forms = [(name, module) for name, module in layer.named_modules() if isinstance(module, WeightForm)]
    return tuple((name, form.structure()) for name, form in forms)


def _weight_slots(layer: nn.Module) -> list[_Slot]:
    """Where a layer keeps its parameters and buffers."""
    owners = (owner for module in layer.modules() for owner in (module._parameters, module._buffers))
    return [(owner, name) for owner in owners for name, tensor in owner.items() if tensor is not None]


@contextmanager
def _weights_replaced(slots: list[_Slot], tensors: list[torch.Tensor]) -> Iterator[None]:
    """Layers with other tensors for weights. (torch.func.functional_call refuses to be traced.)"""
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
    """The tensors of a plan for decoding in a row; _step_from puts them together again."""
    scratch = plan.scratch
    found: list[torch.Tensor | None] = [scratch.k, scratch.v, scratch.wide_k, scratch.wide_v]
    for batch in plan.decode:
        found += [batch.tokens, batch.cache_rows, batch.mask]
        if batch.bags is not None:
            found += [batch.bags.rows, batch.bags.starts]
    return [tensor for tensor in found if tensor is not None]


def _step_from(tensors: Iterator[torch.Tensor], batch_forms: _BatchForms, kv_rows: torch.Tensor) -> TorchStep:
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
    return TorchStep(rope, kv_rows, AttentionPlan(batches, (), scratch))
