"""A kernel cache that is built as if there were no GPU serves on this one; cold starts with and without it.

PYTHONPATH=src python benchmarks/gpu/kernel_cache.py --output kernel_cache.json

Processes of their own: one builds the cache with the GPUs hidden, as `halimede warmup` does, one serves from
it under jit="forbid", one starts with an empty cache. Each of the two starts is from Python's start to the
first answer. On a CPU only one kernel is built, and serving does not look at it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from geometry import load_geometry
from stage import Results, stage_arguments

SERVE = """
import json, sys, time
started, device, backend = float(sys.argv[4]), sys.argv[5], sys.argv[6]
import torch
from halimede import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, jit=sys.argv[2],
          kernel_cache_dir=sys.argv[3], device=device, attention_backend=backend, max_num_seqs=64)
ready = time.time()
every = [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 5},
         {"logit_bias": {3: 1.0}}, {"allowed_token_ids": [1, 2]},
         {"repetition_penalty": 1.2}, {"prompt_logprobs": 0}]
if device == "cpu":
    every = every[:1]
params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, **one}) for one in every]
prompts = [{"prompt_token_ids": list(range(3, 40 + 10 * i))} for i in range(len(every))]
llm.generate(prompts[:1], params[:1], use_tqdm=False)
answered = time.time()
if device != "cpu":
    llm.generate(prompts, params, use_tqdm=False)
c = llm.kernel_counters
print(json.dumps({"imports_s": imported - started, "ready_s": ready - started,
    "first_answer_s": answered - started, "all_s": time.time() - started,
    **({} if c is None else {"jit_compiles_total": c.jit_compiles_total,
    "kernel_cache_hits_total": c.kernel_cache_hits_total,
    "jit_compile_seconds_total": c.jit_compile_seconds_total})}))
"""

BUILD = """
import json, sys, torch
from pathlib import Path
from halimede.engine.build import open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup.pool import build_all, default_jobs
from halimede.engine.warmup.specialisations import serving_specialisations
from halimede.kernels.store import KernelStore
from halimede.kernels.target import find_target
if __name__ == "__main__":
    config = EngineConfig(model=sys.argv[1], load_format="dummy", max_num_seqs=64)
    _, model = open_model(config)
    settings = resolve_settings(config, model, torch.device("meta"))
    wanted = serving_specialisations(config, model, settings, find_target(sys.argv[2]))
    few = int(sys.argv[4])
    jobs = 1 if few else default_jobs()
    summary = build_all(wanted[:few or None], KernelStore(Path(sys.argv[3])), jobs=jobs)
    print(json.dumps({"wanted": len(wanted), "compiled": summary.compiled, "seconds": summary.seconds,
        "failed": [error for _, error in summary.failed], "bytes": summary.bytes}))
"""
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
REHEARSED_TARGET, REHEARSED_KERNELS = "sm_90", 1


def run(code: str, folder: Path, *arguments: Any, **environment: str) -> dict[str, Any]:
    """The JSON that a script prints in a fresh process. RuntimeError with its last words if it fails."""
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:].strip() or f"exit status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(results: Results, folder: Path, target: str, device: str) -> None:
    geometry = load_geometry("tiny" if results.rehearsal else "smollm2-135m")
    model, cache = geometry.write(folder / "model"), folder / "cache"
    few = REHEARSED_KERNELS if results.rehearsal else 0
    with results.attempt("building without a GPU"):
        built = run(BUILD, folder, model, target, cache, few, **HIDDEN)
        results.put("built", built)
        print("built", built, flush=True)
        if built["failed"]:
            results.fail("building without a GPU", built["failed"][0])
    backend = "torch" if results.rehearsal else "triton"
    starts = [("warm", "forbid", cache), ("cold", "allow", folder / "empty")]
    for name, jit, kernels in starts[:1] if results.rehearsal else starts:
        with results.attempt(f"{name} start"):
            served = run(SERVE, folder, model, jit, kernels, time.time(), device, backend)
            results.put(name, served)
            print(name, served, flush=True)


def check(results: Results) -> str:
    """The verdict, which counts as a failure if it is a bad one."""
    if results.rehearsal:
        return "no GPU: serving took nothing from the cache"
    warm = results.data.get("warm", {})
    if warm.get("jit_compiles_total") == 0 and warm.get("kernel_cache_hits_total", 0) > 0:
        return "served with nothing compiled"
    results.fail("warm start", f"kernels were compiled, or none came from the cache: {warm}")
    return "FAILED"


def main() -> int:
    options = stage_arguments(__doc__).parse_args()
    device = torch.device(options.device)
    target = REHEARSED_TARGET
    if device.type == "cuda":
        from halimede.kernels.target import target_of_device

        target = target_of_device(torch.device("cuda", device.index or 0)).machine
    results = Results(options.output, device, target=target)
    with tempfile.TemporaryDirectory() as folder:
        measure(results, Path(folder), target, options.device)
    print(f"kernel cache: {check(results)}")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
