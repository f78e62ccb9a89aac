"""Seeded tiny models of every family on this GPU: Triton, torch and xformers attention against transformers.

PYTHONPATH=src:tests python benchmarks/gpu/end_to_end.py --output end_to_end.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB_SIZE, greedy_reference, write_variant

from halimede import LLM, SamplingParams

VARIANTS = ("llama", "llama-llama3-rope", "qwen2-yarn", "qwen3", "gemma3", "mistral-window")
TOKENS = 8


def generate(checkpoint: Path, prompts: list[list[int]], backend: str, device: str) -> list[list[int]]:
    with LLM(
        str(checkpoint),
        device=device,
        dtype="float32",
        attention_backend=backend,
        max_model_len=128,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        num_gpu_blocks_override=64,
        skip_tokenizer_init=True,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check(variant: str, backends: list[str], device: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 5, 19, 40, 90)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_variant(Path(folder), variant)
        expected = [greedy_reference(checkpoint, prompt, TOKENS) for prompt in prompts]
        for backend in backends:
            try:
                got = generate(checkpoint, prompts, backend, device)
                equal = sum(ours == theirs for ours, theirs in zip(got, expected, strict=True))
                error = None
            except Exception as problem:
                equal, error = 0, f"{type(problem).__name__}: {problem}"[:2000]
            results.append(
                {"variant": variant, "backend": backend, "equal": equal, "of": len(prompts), "error": error}
            )
            print(f"{variant:<20}{backend:<10}{equal} of {len(prompts)}  {error or ''}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="triton,torch")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for variant in options.variants.split(","):
        results += check(variant, options.backends.split(","), options.device)
        options.output.write_text(json.dumps(results, indent=1))
    return 0 if all(result["equal"] == result["of"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
