"""Products with quantized weights at Llama-3-8B's shapes, beside bfloat16 and torch's own 8-bit products.

PYTHONPATH=src python benchmarks/gpu/quantized_products.py --output quantized_products.json

Weights are random, quantized by the engine's own code and laid out by its forms; each call of a graph has
another copy of them, more than the L2 cache holds. Every form is also held against the product in float64 of
what its weight (and its rounded activations) stand for. Shapes of a kind are measured in a process that is
replaced when the GPU does not answer any more.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Bench
from ceilings import load_ceilings
from geometry import load_geometry
from graph_rounds import little_garbage, median_us, record
from kernels_ahead import build_for_calls
from product_errors import EXACT, ROUNDED, check_product
from quantized_weights import (
    DTYPE,
    Call,
    bytes_of,
    codes_for,
    form_of,
    form_on_meta,
    random_weight,
    torch_calls,
    values_of,
    with_tensors,
)
from stage import CONTEXT_LOST, Results, stage_arguments

from halimede.engine.quant.canonical import CanonicalWeight
from halimede.engine.quant.forms.base import QuantizedActivations, WeightForm

ROWS, REHEARSED_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 4096), (1, 3)
REHEARSED_SHAPES = {"qkv": (256, 128), "down": (128, 256)}
ORDER = ("int4", "fp8", "int8", "fp8 block")

Job = tuple[str, str]


def shapes_of(*, rehearsed: bool) -> dict[str, tuple[int, int]]:
    """N and K of each matrix."""
    return REHEARSED_SHAPES if rehearsed else load_geometry("llama-3-8b").projections


def name_of(job: Job) -> str:
    return f"{job[0]}, {job[1]}"


def jobs_of(kinds: Sequence[str], *, rehearsed: bool) -> list[Job]:
    """(kind, matrix), the most telling first: time may end early."""
    return [(kind, name) for kind in ORDER if kind in kinds for name in shapes_of(rehearsed=rehearsed)]


def x_of(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device, dtype=DTYPE)


class Product:
    """A weight of a kind and shape, in as many copies as it takes."""

    def __init__(self, job: Job, weight: CanonicalWeight, bench: Bench) -> None:
        self.kind, self.name = job
        self.weight, self.bench = weight, bench
        self.n, self.k = weight.shape
        forms = [form_of(weight, bench.device)]
        forms += [form_of(weight, bench.device) for _ in range(bench.copies(bytes_of(forms[0])) - 1)]
        self.forms: list[WeightForm] = forms
        self.values = weight.dequantize().double()
        copies = bench.copies(2 * self.n * self.k)
        self.plain = [self.values.to(DTYPE).clone() for _ in range(copies)]
        codes = bench.copies(self.n * self.k)
        self.coded = [] if job[0] == "int4" else [with_tensors(weight, torch.clone) for _ in range(codes)]

    def measure(self, rows: int) -> None:
        """Check and time it for so many rows."""
        results, device = self.bench.results, self.bench.device
        what = f"{self.kind}, {self.name} {self.n} x {self.k}, {rows} rows"
        x = x_of(rows, self.k, device)
        codes = codes_for(self.forms[0], x)
        errors: dict[str, float] = {}
        for name, call, values, bounds in self._checks(x, codes):
            with results.attempt(f"{what}: {name}"):
                found = check_product(call, values, self.values, bounds)
                errors |= {f"{name}: rms": found.rms, f"{name}: largest": found.largest}
        num_bytes = bytes_of(self.forms[0]) + x.nbytes + 2 * rows * self.n
        recordings = {}
        for name, calls in self._contenders(x, codes):
            with results.attempt(f"{what}: {name}, timed"):
                least_us = self._least_us(name, num_bytes, rows)
                recordings[name] = record(calls, device, least_us=least_us)
        with results.attempt(f"{what}: timing"):
            us = median_us(recordings, device)
            row = {"kind": self.kind, "shape": self.name, "n": self.n, "k": self.k, "rows": rows}
            row |= {"us": us, "bytes": num_bytes, "flops": 2 * rows * self.n * self.k, "errors": errors}
            if (ours := best_of(us)) is not None:
                row["of_copy"] = num_bytes / ours * 1e6 / self.bench.best["copy_bytes_per_s"]
            results.add("rows", row)
            print(line_of(row), flush=True)

    def _checks(
        self, x: torch.Tensor, codes: QuantizedActivations | None
    ) -> Iterator[tuple[str, Call, torch.Tensor, Any]]:
        form = self.forms[-1]
        if codes is None:  # W8A8 rounds them all the same
            bounds = ROUNDED[torch.int8] if self.kind == "int8" else EXACT
            yield "x", partial(form, x), x.double(), bounds
            return
        yield "x", partial(form, x), x.double(), ROUNDED[codes.codes.dtype]
        yield "codes", partial(form, codes), values_of(codes), EXACT

    def _contenders(
        self, x: torch.Tensor, codes: QuantizedActivations | None
    ) -> Iterator[tuple[str, list[Call]]]:
        yield "bfloat16", [partial(torch.matmul, x, weight.t()) for weight in self.plain]
        yield "x", [partial(form, x) for form in self.forms]
        if codes is not None:
            yield "codes", [partial(form, codes) for form in self.forms]
        try:
            calls = torch_calls(self.kind, self.coded, x)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            self.bench.results.note(f"torch has no product of {self.kind} for {len(x)} rows here: {reason}")
            return
        if calls:
            yield "torch", calls

    def _least_us(self, name: str, num_bytes: int, rows: int) -> float:
        """What the card needs for it at least, by its bytes and its arithmetic in bfloat16."""
        best = self.bench.best
        if name == "bfloat16":
            num_bytes = 2 * self.n * self.k
        of_product = rows * 2 * self.n * self.k / best["bfloat16_flop_per_s"]
        return float(1e6 * max(num_bytes / best["copy_bytes_per_s"], of_product))


def best_of(us: dict[str, float]) -> float | None:
    """Of ours with activations already rounded, if it takes them; what serving uses."""
    return us.get("codes", us.get("x"))


def line_of(row: dict[str, Any]) -> str:
    us = row["us"]
    text = f"{row['kind']:<10}{row['shape']:<8}{row['n']:>6} x {row['k']:<6}{row['rows']:>5} rows"
    text += "".join(f"  {name} {value:9.2f} us" for name, value in us.items())
    ours = best_of(us)
    if ours is None:
        return text
    if "bfloat16" in us:
        text += f"  {us['bfloat16'] / ours:5.2f} x bfloat16"
    return f"{text}  {row['of_copy']:4.0%} of copy  {row['flops'] / ours / 1e6:6.1f} TFLOP/s"


def launches(jobs: Sequence[Job], device: torch.device) -> Iterator[Call]:
    """Calls that launch what the jobs launch, on the meta device."""
    sizes, meta = shapes_of(rehearsed=False), torch.device("meta")

    def run(weight: CanonicalWeight, rows: int) -> None:
        form = form_on_meta(weight)
        x = x_of(rows, form.in_features, meta)
        form(x)
        codes = codes_for(form, x)
        if codes is not None:
            form(codes)

    for kind, name in jobs:
        weight = random_weight(kind, *sizes[name], device)
        yield from (partial(run, weight, rows) for rows in ROWS)


def work(results: Results, jobs: Sequence[Job], device: torch.device) -> None:
    """Measure the jobs; results know which one is under way and which are done."""
    with torch.inference_mode():
        best = results.data.get("ceilings") or load_ceilings(results.output.parent, device)
        results.put("ceilings", best)
        with results.attempt("compiling ahead"):
            build_for_calls([] if results.rehearsal else launches(jobs, device), device)
        with little_garbage():
            for job in jobs:
                results.put("job", name_of(job))
                with results.attempt(name_of(job)):
                    measure(job, Bench(device, results, best))
                results.add("done", name_of(job))


def measure(job: Job, bench: Bench) -> None:
    torch.manual_seed(len(bench.results.data.get("rows", ())))
    sizes = shapes_of(rehearsed=bench.rehearsed)[job[1]]
    product = Product(job, random_weight(job[0], *sizes, bench.device), bench)
    for rows in REHEARSED_ROWS if bench.rehearsed else ROWS:
        product.measure(rows)


def supervise(results: Results, jobs: Sequence[Job], device: str) -> None:
    """Processes that measure the jobs: a new one where the GPU, or the process, died of one."""
    left = list(jobs)
    while left:
        command = [sys.executable, str(Path(__file__)), "--output", str(results.output), "--device", device]
        status = subprocess.run([*command, "--jobs", *map("/".join, left)], check=False).returncode
        results.reload()
        if status in (0, 1):
            return
        job = results.data.get("job")
        if job is None or job not in map(name_of, left):
            results.fail("quantized products", f"the process ended with status {status}")
            return
        if status != CONTEXT_LOST:
            results.fail(job, f"the process ended with status {status}")
        over = {*results.data.get("done", ()), job}
        left = [one for one in left if name_of(one) not in over]


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--kinds", default=",".join(ORDER), help="some of: " + ", ".join(ORDER))
    parser.add_argument("--jobs", nargs="+", help="measure these, KIND/MATRIX, and go on with --output")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.jobs:
        results = Results(options.output, device, resume=True)
        work(results, [tuple(job.split("/")) for job in options.jobs], device)
        return results.status
    results = Results(options.output, device, geometry="llama-3-8b")
    supervise(results, jobs_of(options.kinds.split(","), rehearsed=results.rehearsal), options.device)
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
