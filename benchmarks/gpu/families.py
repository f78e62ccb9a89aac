"""Seeded tiny models of every family on this GPU, beside transformers in float32 on the CPU.

PYTHONPATH=src:tests python benchmarks/gpu/families.py --output families.json

In float32 graphs, single launches, torch's attention and xformers' must give transformers' tokens, all of
them; in bfloat16 and with a KV cache of 8 bits near_ties.py says what is right.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels_ahead import build_for_engines
from near_ties import gaps, judge, right_in_bfloat16, right_with_narrow_cache
from stage import Results, stage_arguments
from tiny_models import VARIANTS, VOCAB_SIZE, transformers_model, write_tiny_checkpoint

from halimede import LLM, SamplingParams
from halimede.engine.config import EngineConfig

FAMILIES = ("llama", "llama-llama3-rope", "qwen2-yarn", "qwen3", "gemma3", "mistral-window")
LENGTHS, TOKENS = (1, 5, 19, 40, 90), 8
REHEARSED_LENGTHS, REHEARSED_TOKENS = (9,), 2


@dataclass(frozen=True)
class Mode:
    """One way to run a model; `settings` are EngineConfig's."""

    name: str
    settings: dict[str, Any]

    @property
    def dtype(self) -> str:
        return str(self.settings["dtype"])

    @property
    def cache(self) -> str:
        return str(self.settings.get("kv_cache_dtype", "auto"))


def modes(*, rehearsed: bool) -> Iterator[Mode]:
    triton: dict[str, Any] = {"attention_backend": "triton", "dtype": "float32"}
    yield Mode("graphs", triton)
    if not rehearsed:  # a CPU has no graphs to leave out
        yield Mode("eager", {**triton, "enforce_eager": True})
    yield Mode("torch", {"attention_backend": "torch", "dtype": "float32"})
    if not rehearsed and importlib.util.find_spec("xformers") is not None:
        yield Mode("xformers", {"attention_backend": "xformers", "dtype": "float32"})
    yield Mode("graphs, bfloat16", {**triton, "dtype": "bfloat16"})
    if not rehearsed:
        yield Mode("eager, bfloat16", {**triton, "dtype": "bfloat16", "enforce_eager": True})
    yield Mode("graphs, int8 cache", {**triton, "kv_cache_dtype": "int8"})
    if not rehearsed:
        yield Mode("graphs, fp8 cache", {**triton, "kv_cache_dtype": "fp8"})


class Reference:
    """transformers' model of a checkpoint, in float32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = transformers_model(checkpoint)

    def logits(self, tokens: list[int], count: int) -> torch.Tensor:
        """(count, V): those that the last `count` tokens are chosen from."""
        with torch.inference_mode():
            found: torch.Tensor = self._model(torch.tensor([tokens])).logits[0, -count - 1 : -1].float()
        return found

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits([*tokens, 0], 1)[0].argmax()))
        return tokens[len(prompt) :]


def write_checkpoint(folder: Path, family: str) -> Path:
    """With weights that bfloat16 holds exactly, so that both types run the same model."""
    architecture, overrides = VARIANTS[family]
    return write_tiny_checkpoint(folder / family, architecture, dtype=torch.bfloat16, **overrides)


def engine_config(checkpoint: Path, mode: Mode, device: str) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        device=device,
        max_model_len=128,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        num_gpu_blocks_override=64,
        skip_tokenizer_init=True,
        **mode.settings,
    )


def generate(config: EngineConfig, prompts: list[list[int]], count: int) -> list[list[int]]:
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "model"}
    with LLM(config.model, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(
    mode: Mode,
    reference: Reference,
    prompts: list[list[int]],
    expected: list[list[int]],
    got: list[list[int]],
) -> dict[str, Any]:
    """The judgement on what a mode gave, as a row of the results."""
    equal = sum(ours == theirs for ours, theirs in zip(got, expected, strict=True))
    pairs = zip(prompts, got, strict=True)
    choices = judge([gaps(reference.logits(prompt + ours, len(ours)), ours) for prompt, ours in pairs])
    if mode.cache != "auto":
        right = right_with_narrow_cache(choices, mode.cache)
    elif mode.dtype == "bfloat16":
        right = right_in_bfloat16(choices)
    else:
        right = equal == len(prompts)
    return {
        "right": right,
        "equal": equal,
        "of": len(prompts),
        "largest_gap": choices.gap,
        "best_share": choices.largest,
    }


def check_family(results: Results, checkpoint: Path, device: str) -> None:
    family = checkpoint.name
    rehearsed = results.rehearsal
    lengths, count = (REHEARSED_LENGTHS, REHEARSED_TOKENS) if rehearsed else (LENGTHS, TOKENS)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    reference = Reference(checkpoint)
    expected = [reference.greedy(prompt, count) for prompt in prompts]
    for mode in modes(rehearsed=rehearsed):
        what = f"{family}, {mode.name}"
        with results.attempt(what):
            got = generate(engine_config(checkpoint, mode, device), prompts, count)
            row = {"family": family, "mode": mode.name, **compare(mode, reference, prompts, expected, got)}
            results.add("rows", row)
            print(
                f"{what:<42}{row['equal']} of {row['of']} equal, {row['best_share']:.0%} best logits, "
                f"largest gap {row['largest_gap']:.3f}",
                flush=True,
            )
            if not row["right"]:
                results.fail(what, f"not transformers' tokens: {row}")


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--families", help="default: all, on a CPU one")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = Results(options.output, device)
    names = options.families or ("llama" if results.rehearsal else ",".join(FAMILIES))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [write_checkpoint(Path(folder), name) for name in names.split(",")]
        every = list(modes(rehearsed=results.rehearsal))
        configs = [engine_config(one, mode, options.device) for one in checkpoints for mode in every]
        with results.attempt("compiling ahead"):
            build_for_engines(configs, device)
        for checkpoint in checkpoints:
            with results.attempt(checkpoint.name):
                check_family(results, checkpoint, options.device)
    rows = results.data.get("rows", [])
    print(f"families: {sum(row['right'] for row in rows)} of {len(rows)} runs are as transformers has them")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
