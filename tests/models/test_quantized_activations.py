"""Norms and activations round for the product after them: the same results, in fewer launches.

The forms here multiply codes by a dense weight in torch, so that what is tested is who rounds, and how often.
Kernels are interpreted.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import read_config, run_model, write_variant
from tolerances import ROUNDED_ACTIVATIONS

from halimede.engine.layers.attention_gpu import GpuBackend, TritonAttention
from halimede.engine.layers.attention_torch import TorchBackend
from halimede.engine.layers.linear import Linear
from halimede.engine.layers.mlp import GatedMLP
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import build_model
from halimede.engine.quant.forms.base import (
    ActivationQuant,
    Activations,
    Placement,
    QuantizedActivations,
    WeightForm,
)
from halimede.kernels.gpu.quantize import per_token_quant
from halimede.kernels.interpret import interpret
from halimede.kernels.launch import INTERPRETED_TARGET, Launch, intercepting
from halimede.kernels.ops import Gate, triton_ops

CPU = torch.device("cpu")
TOKENS = [1, 17, 300, 42, 5, 99, 256]
INT8, FP8 = torch.int8, torch.float8_e4m3fn
QUANTS = {
    "int8": ActivationQuant(INT8),
    "fp8": ActivationQuant(FP8),
    "fp8 in groups": ActivationQuant(FP8, group_size=16),
    "static int8": ActivationQuant(INT8, scale=torch.tensor([0.04])),
    "static fp8": ActivationQuant(FP8, scale=torch.tensor([0.03])),
}


class RoundingForm(WeightForm):
    """W (N, K) times activations that are rounded as `quant` says. rounds: whether the layer before may.

    bias, gates: whether the form does those itself.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quant: ActivationQuant,
        *,
        rounds: bool = True,
        bias: bool = False,
        gates: bool = False,
    ) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), Placement(CPU, weight.dtype))
        self._hold("weight", weight.float())
        self._quant, self._takes_quantized = quant, rounds
        self._takes_bias, self._gates = bias, gates
        self.activations: list[Gate] = []

    @property
    def quantizes(self) -> ActivationQuant | None:
        return self._quant if self._takes_quantized else None

    def take_bias(self, bias: torch.Tensor) -> bool:
        if self._takes_bias:
            self._hold("bias", bias)
        return self._takes_bias

    def make_gated(self, activation: Gate) -> bool:
        if self._gates:
            self.activations.append(activation)
        return self._gates

    def forward(self, x: Activations) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            quant = self._quant
            x = QuantizedActivations(*per_token_quant(x, quant.dtype, quant.group_size, quant.scale), x.dtype)
        rows, columns = x.codes.shape
        scales = x.scales.view(1, 1) if x.scales.shape != (rows,) and x.scales.dim() == 1 else x.scales
        scales = scales.view(scales.shape[0], -1)
        y = (x.codes.float() * scales.repeat_interleave(columns // scales.shape[1], 1)) @ self.weight.t()
        if self.bias is not None:
            y += self.bias
        if self.activations:
            gate, up = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        return y.to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


def _model(path: Path, quant: ActivationQuant, *, triton: bool = True, rounds: bool = True) -> CausalLM:
    """The model in bfloat16 with a RoundingForm in the place of each weight of its layers."""
    config = read_config(path)
    model = build_model(config)
    files = ModelFiles(str(path), "safetensors", tuple(path.glob("*.safetensors")), {}, str(path))
    with open_weights(files) as source:
        load_weights(model, source, device=CPU, dtype=torch.bfloat16, progress=False)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                module.take_form(RoundingForm(module.weight, quant, rounds=rounds))
    backend = GpuBackend(TritonAttention(256, 4)) if triton else TorchBackend()
    model.prepare(CPU, torch.bfloat16, 256, backend=backend)
    return model


def _run(model: CausalLM) -> tuple[torch.Tensor, Counter[str]]:
    """Logits, in a chunk of several tokens and one of one; and how often each kernel was launched."""
    launched: Counter[str] = Counter()

    def run(launch: Launch) -> None:
        launched[launch.kernel.__name__] += 1
        interpret(launch.kernel, launch.grid, launch.args, dict(launch.constants))

    with intercepting(INTERPRETED_TARGET, run):
        return run_model(model, TOKENS, chunk_size=len(TOKENS) - 1).float(), launched


@pytest.mark.parametrize(
    ("variant", "quant"),
    [*(("llama", quant) for quant in QUANTS), ("qwen2", "fp8"), ("gemma3", "int8"), ("gemma3", "static fp8")],
)
def test_models_round_in_norms_and_activations(variant: str, quant: str, tmp_path: Path) -> None:
    path, steps = write_variant(tmp_path, variant), 2
    fused, launched = _run(_model(path, QUANTS[quant]))
    alone, apart = _run(_model(path, QUANTS[quant], rounds=False))
    assert torch.equal(fused, alone)  # codes of one launch are those of two
    on_cpu = run_model(_model(path, QUANTS[quant], triton=False), TOKENS).float()
    error = (fused - on_cpu).square().mean().sqrt() / on_cpu.std()
    assert error < ROUNDED_ACTIVATIONS
    layers = read_config(path).num_hidden_layers * steps
    gemma = 2 * layers * (variant == "gemma3")  # norms after attention and feed-forward, into the residual
    assert launched["_rms_norm_quant_kernel"] == 2 * layers
    assert launched["_activate_quant_kernel"] == layers
    assert launched["_quantize_kernel"] == layers  # what attention gives to o_proj
    assert launched["_rms_norm_kernel"] == gemma + steps  # no 16-bit copy of what is rounded
    assert launched["_activate_kernel"] == 0
    assert (apart["_quantize_kernel"], apart["_rms_norm_quant_kernel"]) == (4 * layers, 0)


@pytest.fixture
def norm() -> RMSNorm:
    torch.manual_seed(0)
    layer = RMSNorm(64, 1e-5)
    layer.weight = torch.nn.Parameter(1 + torch.randn(64) / 8, requires_grad=False)
    return layer


def _linear(out_features: int, in_features: int, *, bias: bool = False, **options: bool) -> Linear:
    layer = Linear(in_features, out_features, bias=bias)
    layer.take_form(RoundingForm(torch.randn(out_features, in_features), QUANTS["int8"], **options))
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(out_features), requires_grad=False)
    return layer


def test_a_norm_rounds_for_the_product_it_feeds_alone(norm: RMSNorm) -> None:
    norm.prepare(torch.float32, triton_ops())
    x = torch.randn(3, 64)
    assert isinstance(norm.for_product(x), torch.Tensor)  # nothing said
    norm.feeds(_linear(8, 64))
    rounded = norm.for_product(x)
    assert isinstance(rounded, QuantizedActivations)
    codes, scales = per_token_quant(norm(x), INT8)
    assert torch.equal(rounded.codes, codes)
    assert torch.equal(rounded.scales, scales)
    assert rounded.dtype == x.dtype
    assert isinstance(norm(x), torch.Tensor)
    assert isinstance(norm.add(x, x.clone()), torch.Tensor)
    for other in (_linear(8, 64, rounds=False), Linear(64, 8, bias=False)):
        norm.feeds(other)
        assert isinstance(norm.add_for_product(x, x.clone()), torch.Tensor)


def test_a_norm_adds_and_rounds(norm: RMSNorm) -> None:
    norm.prepare(torch.float32, triton_ops())
    norm.feeds(_linear(8, 64))
    x, residual = torch.randn(2, 3, 64)
    total = x + residual
    rounded = norm.add_for_product(x, residual)
    assert torch.equal(residual, total)
    assert isinstance(rounded, QuantizedActivations)
    assert torch.equal(rounded.codes, per_token_quant(norm(total), INT8)[0])


def test_nothing_rounds_with_torchs_operations(norm: RMSNorm) -> None:
    norm.feeds(_linear(8, 64))
    x = torch.randn(3, 64)
    assert torch.equal(norm.for_product(x), norm(x))
    assert torch.equal(norm.add_for_product(x, x.clone()), norm(x + x))


def _mlp(*, gates: bool, bias: bool = False) -> tuple[GatedMLP, RoundingForm]:
    torch.manual_seed(0)
    mlp = GatedMLP(64, 32, bias=bias)
    mlp.down_proj = _linear(64, 32)
    form = RoundingForm(torch.randn(64, 64) / 8, QUANTS["int8"], gates=gates)
    mlp.gate_up_proj.take_form(form)
    if bias:
        mlp.gate_up_proj.bias = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
    mlp.prepare(triton_ops())
    mlp.prepare(triton_ops())
    return mlp, form


def test_a_form_that_gates_is_told_once_and_its_activation_left_out() -> None:
    (plain, _), (gated, form) = _mlp(gates=False), _mlp(gates=True)
    x = torch.randn(3, 64)
    assert form.activations == ["silu"]
    torch.testing.assert_close(gated(x), plain(x), rtol=0.02, atol=0.02)


def test_gate_and_up_with_a_bias_are_not_gated_by_their_form() -> None:
    assert _mlp(gates=True, bias=True)[1].activations == []


@pytest.mark.parametrize("takes", [True, False])
def test_a_bias_is_added_once_whoever_adds_it(takes: bool) -> None:
    torch.manual_seed(0)
    layer = _linear(8, 64, bias=True)
    bias, form = layer.bias, layer.form
    assert isinstance(form, RoundingForm)
    assert bias is not None
    form._takes_bias = takes
    layer.prepare(torch.float32)
    layer.prepare(torch.float32)
    assert (layer.bias is None) == takes
    x = torch.randn(3, 64)
    codes, scales = per_token_quant(x, INT8)
    expected = codes.float() * scales[:, None] @ form.weight.t() + bias
    torch.testing.assert_close(layer(x), expected)


def test_which_roundings_agree() -> None:
    whole, groups = ActivationQuant(FP8), ActivationQuant(FP8, 128)
    one, same, other = (ActivationQuant(FP8, scale=torch.tensor([s])) for s in (0.5, 0.5, 0.25))
    assert whole.agrees_with(ActivationQuant(FP8))
    assert one.agrees_with(same)
    for a, b in ((whole, groups), (whole, ActivationQuant(INT8)), (one, other), (one, whole), (whole, None)):
        assert not a.agrees_with(b)
