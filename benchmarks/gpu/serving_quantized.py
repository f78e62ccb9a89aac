"""Decoding with quantized weights: serving.py for each kind, the most telling cases first.

PYTHONPATH=src python benchmarks/gpu/serving_quantized.py --output serving_quantized.json

Kernels of all kinds are compiled ahead at once; then each kind has a process of its own, so that what fails
in one leaves the others alone. What they write is taken over as it comes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ceilings import load_ceilings
from geometry import Geometry, choose_geometry
from kernels_ahead import build_for_engines
from roofline import aimed_share
from serving import plan_of
from stage import Results, stage_arguments
from timing import gpu_memory

from halimede.engine.config import EngineConfig

METHODS = ("int4", "fp8", "int8")
REHEARSED_METHODS = ("int4",)
_POLL_S = 0.5


def build_ahead(geometry: Geometry, methods: Sequence[str], device: torch.device) -> None:
    settings = plan_of(rehearsed=device.type == "cpu", eager=False, quantized=True).settings
    with tempfile.TemporaryDirectory() as folder:
        model = str(geometry.write(Path(folder)))
        configs = [
            EngineConfig(
                model=model,
                load_format="dummy",
                skip_tokenizer_init=True,
                device=str(device),
                dtype="bfloat16",
                quantization=method,
                **settings,
            )
            for method in methods
        ]
        build_for_engines(configs, device)


def follow(results: Results, method: str, command: Sequence[str], output: Path) -> None:
    """Run serving.py and keep what it has written so far, as "methods" of the results."""
    process = subprocess.Popen([*command, "--quantization", method, "--output", str(output)])
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            take(results, method, output)
    finally:
        process.kill()
        process.wait()
    take(results, method, output)
    found = results.data.get("methods", {}).get(method, {})
    for failure in found.get("failures", ()):
        results.fail(f"{method}: {failure['what']}", failure["error"])
    if process.returncode not in (0, 1) or (process.returncode and not found.get("failures")):
        results.fail(method, f"its process ended with status {process.returncode}")


def take(results: Results, method: str, output: Path) -> None:
    try:
        found: dict[str, Any] = json.loads(output.read_text())
    except (OSError, ValueError):
        return
    rate = found.get("copy_bytes_per_s")
    for row in found.get("rows", ()):
        if rate and "skipped" not in row:
            name = f"{method}: decode, batch {row['batch']}, context {row['context']}"
            row["aimed_share"] = aimed_share(name, row, rate)
    methods = results.data.get("methods", {})
    if methods.get(method) != found:
        results.put("methods", {**methods, method: found})


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--geometry", help="a preset or a file; default llama-3-8b, on a CPU tiny")
    parser.add_argument("--methods", help=f"some of: {', '.join(METHODS)}")
    options = parser.parse_args()
    device = torch.device(options.device)
    rehearsed = device.type == "cpu"
    name = options.geometry or ("tiny" if rehearsed else "llama-3-8b")
    geometry, note = choose_geometry(name, gpu_memory(device))
    methods = options.methods.split(",") if options.methods else REHEARSED_METHODS if rehearsed else METHODS
    results = Results(options.output, device, geometry=geometry.name)
    if note:
        results.note(note)
    with results.attempt("compiling ahead"):
        build_ahead(geometry, methods, device)
    script = Path(__file__).with_name("serving.py")
    command = [sys.executable, str(script), "--device", options.device, "--geometry", name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Measured once for all, while the GPU is free.
        (folder / "ceilings.json").write_text(json.dumps(load_ceilings(options.output.parent, device)))
        for method in methods:
            with results.attempt(method):
                follow(results, method, command, folder / f"{method}.json")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
