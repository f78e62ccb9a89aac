"""What stands between the attentions of Llama-3-8B's layers: matrix products, norms, activation, sampling."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench import Bench, in_turn
from geometry import load_geometry

from halimede.kernels.gpu.sampling_draw import draw_tokens, make_draw_workspace
from halimede.kernels.ops import triton_ops
from halimede.kernels.spec import all_kernels

ROWS, REHEARSED_ROWS = (1, 8, 32, 128, 256), (2,)
GATED_ROWS = (1, 4, 16)
EPS = 1e-5
_BF16 = torch.bfloat16

Call = Callable[[], Any]


def time_products(bench: Bench) -> None:
    """torch's bfloat16 products x W^T, weights read from memory: each call has another copy of them."""
    geometry = load_geometry("tiny" if bench.rehearsed else "llama-3-8b")
    for name, (size, inner) in geometry.projections.items():
        copies = bench.copies(2 * size * inner)
        weights = [torch.randn(size, inner, device=bench.device).to(_BF16) for _ in range(copies)]
        for rows in REHEARSED_ROWS if bench.rehearsed else ROWS:
            x = torch.randn(rows, inner, device=bench.device).to(_BF16)
            call = in_turn([partial(torch.nn.functional.linear, x, weight) for weight in weights])
            work = {"bytes": 2 * (size * inner + rows * (size + inner)), "flops": 2 * rows * size * inner}
            bench.add("torch product", f"{name} {size} x {inner}, {rows} rows", call, repeats=copies, **work)


def layer_calls(rows: int, device: torch.device, *, tiny: bool = False) -> Iterator[tuple[str, Call, int]]:
    """(name, call, bytes) of our small kernels for so many rows."""
    config = load_geometry("tiny" if tiny else "llama-3-8b").config
    hidden, middle, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    ops = triton_ops()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=_BF16)

    x, residual, weight, logits = (
        random(rows, hidden),
        random(rows, hidden),
        random(hidden),
        random(rows, vocabulary),
    )
    both = random(rows, 2 * middle)
    workspace = make_draw_workspace(rows, device)
    temperature = torch.ones(rows, device=device)
    keys = torch.ones(rows, 2, dtype=torch.int64, device=device)
    row = 2 * rows * hidden
    yield "rms_norm", partial(ops.rms_norm, x, weight, EPS, None), 2 * row
    yield "add_rms_norm", partial(ops.add_rms_norm, x, residual, weight, EPS, None), 4 * row
    yield "silu_and_mul", partial(ops.silu_and_mul, both), 6 * rows * middle
    yield "sampling, greedy", partial(draw_tokens, logits, workspace), 2 * rows * vocabulary
    drawn = partial(draw_tokens, logits, workspace, temperature=temperature, keys=keys)
    yield "sampling, random", drawn, 2 * rows * vocabulary


def layer_launches() -> Iterator[Call]:
    for rows in ROWS:
        yield from (call for _, call, _ in layer_calls(rows, torch.device("meta")))


def time_layers(bench: Bench) -> None:
    for rows in REHEARSED_ROWS if bench.rehearsed else ROWS:
        for name, call, num_bytes in layer_calls(rows, bench.device, tiny=bench.rehearsed):
            bench.add("Llama-3-8B", f"{name}, {rows} rows", call, bytes=num_bytes)


def time_gated_matmul(bench: Bench) -> None:
    """The kernel of that name, if there is one, beside torch's product and our activation."""
    spec = all_kernels().get("gated_matmul")
    if spec is None:
        bench.results.note("there is no kernel gated_matmul: it is not timed")
        return
    case = spec.cases[0] if bench.rehearsed else spec.signatures[0]
    torch.manual_seed(0)
    given = case.make(bench.device)
    found = split_arguments(given)
    if found is None:
        bench.results.note(
            "gated_matmul takes other arguments than x and weight: only its signatures are timed"
        )
        return
    x_name, weight_name = found
    size, inner = given[weight_name].shape
    copies = bench.copies(2 * size * inner)
    weights = [torch.randn_like(given[weight_name]) * inner**-0.5 for _ in range(copies)]
    silu_and_mul = triton_ops().silu_and_mul
    for rows in GATED_ROWS[:1] if bench.rehearsed else GATED_ROWS:
        x = torch.randn(rows, inner, device=bench.device).to(given[x_name].dtype)
        work = {"bytes": 2 * (size * inner + rows * (size // 2 + inner)), "flops": 2 * rows * size * inner}
        ours = [partial(spec.launcher, **{**given, x_name: x, weight_name: weight}) for weight in weights]
        name = f"{size} x {inner}, {rows} rows"
        bench.add("gated_matmul", name, in_turn(ours), repeats=copies, **work)
        theirs = [partial(_product_and_activation, silu_and_mul, x, weight) for weight in weights]
        bench.add(
            "gated_matmul", f"{name}: torch, then silu_and_mul", in_turn(theirs), repeats=copies, **work
        )


def _product_and_activation(
    activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weight: torch.Tensor
) -> Any:
    return activation(torch.nn.functional.linear(x, weight))


def split_arguments(given: dict[str, Any]) -> tuple[str, str] | None:
    """The names of x (M, K) and weight (2I, K) among a kernel's arguments; None if they cannot be told."""
    matrices = {n: v for n, v in given.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
    if {"x", "weight"} <= matrices.keys() and matrices["x"].shape[1] == matrices["weight"].shape[1]:
        return "x", "weight"
    return None
