"""Parts of compressed-tensors checkpoints, written by the package's own compressors."""

import json
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from quantized_checkpoints import Checkpoints, Quantize, Stored, read_weights

DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor"}
FP8 = {"num_bits": 8, "type": "float"}
FP8_DYNAMIC = DYNAMIC | {"type": "float"}
FP8_STATIC = STATIC | {"type": "float"}


def int_args(bits: int, group_size: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    """group_size: -1 for a scale for each channel, None for one of the whole tensor."""
    return {"num_bits": bits, "group_size": group_size, "symmetric": symmetric}


def group(
    weights: dict[str, Any], format_: str | None, inputs: dict[str, Any] | None = None, *targets: str
) -> dict[str, Any]:
    return {
        "targets": targets or ("Linear",),
        "weights": weights,
        "input_activations": inputs,
        "format": format_,
    }


def config(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As the package writes it."""
    named = {f"group_{i}": QuantizationScheme(**each) for i, each in enumerate(groups)}
    settings = {"format": groups[0]["format"] or "mixed-precision", "ignore": ["lm_head"], **more}
    dumped = QuantizationConfig(config_groups=named, quantization_status="compressed", **settings)
    result: dict[str, Any] = json.loads(dumped.model_dump_json())
    return result


def scales_of(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of the range of the weights."""
    if args.strategy == "tensor":
        return calculate_qparams(weight.amin(), weight.amax(), args)
    if args.strategy == "channel":
        return calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    rows, columns = args.block_structure or (1, args.group_size)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)


def compress(group: dict[str, Any], dtype: torch.dtype = torch.float32) -> Quantize:
    """The package's compressor of a group. dtype: of the scales."""
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        assert scheme.weights is not None
        scales, zeros = scales_of(weight, scheme.weights)
        state = {"weight": weight, "weight_scale": scales.to(dtype), "weight_zero_point": zeros}
        state = compressor.compress(state, scheme)
        # Its products are rounded to the type of the scales, which ours are not.
        is_mx = state["weight_scale"].dtype == torch.uint8
        wide = state if is_mx else state | {"weight_scale": state["weight_scale"].float()}
        reference = compressor.decompress(wide, scheme)["weight"]
        inputs = scheme.input_activations
        if inputs is not None and not inputs.dynamic:
            state["input_scale"] = torch.tensor([0.02 + 0.001 * (sum(map(ord, name)) % 7)])
            if not inputs.symmetric:
                state["input_zero_point"] = torch.tensor([-9], dtype=torch.int8)
        return Stored(state, reference.float().contiguous())

    return quantize


MX = {"type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP4 = group({"num_bits": 4, **MX}, "mxfp4-pack-quantized")
MXFP8 = group({"num_bits": 8, **MX}, "mxfp8-quantized")


def check_weights(written: Checkpoints) -> None:
    weights = read_weights(written.quantized)
    assert weights.keys() >= written.weights.keys()
    for name, expected in written.weights.items():
        assert torch.equal(weights[name], expected), name
