"""A kernel cache that is built as if there were no GPU serves on this one; cold starts with and without it.

PYTHONPATH=src:tests python benchmarks/gpu/kernel_cache.py --output kernel_cache.json

Processes of their own: one builds the cache with the GPUs hidden, one serves from it under jit="forbid", one
starts with an empty cache. Each of the two starts is from Python's start to the first answer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GEOMETRY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""

SERVE = """
import json, sys, time
started = float(sys.argv[4])
import torch
from halimede import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, jit=sys.argv[2],
          kernel_cache_dir=sys.argv[3], device="cuda", max_num_seqs=64)
ready = time.time()
every = [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 5},
         {"logit_bias": {3: 1.0}}, {"allowed_token_ids": [1, 2]},
         {"repetition_penalty": 1.2}, {"prompt_logprobs": 0}]
params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, **one}) for one in every]
prompts = [{"prompt_token_ids": list(range(3, 40 + 10 * i))} for i in range(len(every))]
llm.generate(prompts[:1], params[:1], use_tqdm=False)
answered = time.time()
llm.generate(prompts, params, use_tqdm=False)
c = llm.kernel_counters
print(json.dumps({"imports_s": imported - started, "ready_s": ready - started,
    "first_answer_s": answered - started,
    "all_s": time.time() - started, "jit_compiles_total": c.jit_compiles_total,
    "kernel_cache_hits_total": c.kernel_cache_hits_total,
    "jit_compile_seconds_total": c.jit_compile_seconds_total}))
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
    summary = build_all(wanted, KernelStore(Path(sys.argv[3])), jobs=default_jobs())
    print(json.dumps({"compiled": summary.compiled, "failed": [error for _, error in summary.failed],
        "seconds": summary.seconds, "bytes": summary.bytes}))
"""


def run(code: str, folder: Path, *arguments: Any, **environment: str) -> dict[str, Any]:
    """The JSON that a script prints in a fresh process; its error, if it fails, under "error"."""
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
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(folder: Path, target: str) -> dict[str, Any]:
    model, cache = folder / "model", folder / "cache"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(GEOMETRY))
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    results = {"built": run(BUILD, folder, model, target, cache, **hidden)}
    for name, jit, kernels in (("warm", "forbid", cache), ("cold", "allow", folder / "empty")):
        results[name] = run(SERVE, folder, model, jit, kernels, time.time())
        print(name, results[name], flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    import torch

    from halimede.kernels.target import target_of_device

    target = target_of_device(torch.device("cuda", 0)).machine
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), target)
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0), "target": target}
    options.output.write_text(json.dumps({**versions, **results}, indent=1))
    warm = results["warm"]
    print("built", results["built"])
    good = warm.get("jit_compiles_total") == 0 and warm.get("kernel_cache_hits_total", 0) > 0
    print(f"kernel cache: {'served with nothing compiled' if good else 'FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
