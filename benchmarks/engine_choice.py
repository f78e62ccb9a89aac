"""Which engines a benchmark compares, from its command line."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine_process import EngineSpec
from make_checkpoint import BF16_GGUF, DIRECTORY, SOURCE, write_bf16_gguf, write_directory

QUICK_NOTE = "**Made with --quick: tiny sizes, the numbers mean nothing.**"
_TCMALLOC = "libtcmalloc_minimal.so.4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks of whole engines share."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        help="checkpoint directory; default: the one of make_checkpoint.py, made if need be",
    )
    add("--gguf", type=Path, action="append", metavar="FILE",
        help="model for llama.cpp, one row each; default: the bfloat16 and the Q4_1 GGUF")  # fmt: skip
    add("--engines", nargs="+", default=["halimede", "transformers"], choices=["halimede", "transformers"],
        help="engines of this environment")  # fmt: skip
    add(
        "--llamacpp-python",
        type=Path,
        metavar="PYTHON",
        help="interpreter that has xllamacpp; adds llama.cpp",
    )
    add("--vllm-python", type=Path, metavar="PYTHON", help="interpreter that has vllm; adds vLLM")
    add("--vllm-preload", nargs="*", metavar="LIBRARY",
        help="what LD_PRELOAD names for vLLM; default: its libiomp5, and tcmalloc if found")  # fmt: skip
    add("--vllm-option", action="append", default=[], metavar="NAME=JSON", help="option of vllm.LLM")
    add("--halimede-option", action="append", default=[], metavar="NAME=JSON", help="option of halimede.LLM")
    add("--halimede-row", nargs="+", action="append", default=[], metavar="WORD",
        help="another row for Halimede: its label, then options NAME=JSON of halimede.LLM")  # fmt: skip
    add(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32", "float16"],
        help="of weights and activations",
    )
    add("--threads", type=int, default=_num_cores(), help="threads of every engine")
    add(
        "--kv-tokens", type=int, default=32 * 1152, help="tokens that the KV cache holds, where it can be set"
    )
    add("--quick", action="store_true", help="tiny sizes, to see that it works; the numbers mean nothing")


def make_specs(args: argparse.Namespace, *, prefix_cache: bool) -> list[EngineSpec]:
    """The rows that the options ask for; writes the default checkpoint if it is missing."""
    model = args.model or _default_model()
    env = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {
        "model": str(model.resolve()),
        "dtype": args.dtype,
        "threads": args.threads,
        "prefix_cache": prefix_cache,
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "kv_tokens": args.kv_tokens,
    }
    specs = []
    if "halimede" in args.engines:
        extra = parse_options(args.halimede_option)
        specs.append(EngineSpec("Halimede", "halimede_worker.py", {**options, "extra": extra}, env=env))
        for label, *words in args.halimede_row:
            row = parse_options(words)
            changed = {**options, "model": row.pop("model", options["model"]), "extra": {**extra, **row}}
            specs.append(EngineSpec(f"Halimede {label}", "halimede_worker.py", changed, env=env))
    if "transformers" in args.engines and not prefix_cache:
        specs.append(EngineSpec("transformers", "transformers_worker.py", options, env=env))
    if args.llamacpp_python:
        for gguf in args.gguf or _default_ggufs():
            changed = {**options, "model": str(gguf.resolve())}
            name = f"llama.cpp {_quantization(gguf)}"
            specs.append(
                EngineSpec(name, "llamacpp_worker.py", changed, python=args.llamacpp_python, env=env)
            )
    if args.vllm_python:
        changed = {**options, "extra": parse_options(args.vllm_option)}
        specs.append(_vllm(args, changed, env))
    return specs


def parse_options(words: Iterable[str]) -> dict[str, Any]:
    """NAME=JSON pairs; what is no JSON is a string."""
    found: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            sys.exit(f"{word!r} is not of the form NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _vllm(args: argparse.Namespace, options: Mapping[str, Any], env: Mapping[str, str]) -> EngineSpec:
    """vLLM with the tuning that its documentation recommends for CPUs."""
    preload = args.vllm_preload
    if preload is None:
        prefix = args.vllm_python.parent.parent
        preload = [*map(str, prefix.glob("lib/libiomp5.so")), *_find_tcmalloc()]
    tuned = {
        **env,
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        "LD_PRELOAD": ":".join(preload),
    }
    return EngineSpec("vLLM", "vllm_worker.py", options, python=args.vllm_python, env=tuned, slow_start=True)


def _find_tcmalloc() -> list[str]:
    folders = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64"))
    return [str(folder / _TCMALLOC) for folder in folders if (folder / _TCMALLOC).exists()][:1]


def _quantization(gguf: Path) -> str:
    """BF16 of Model.BF16.gguf, and the whole stem of other names."""
    return gguf.stem.rsplit(".", 1)[-1].replace("BF16", "bf16")


def _default_model() -> Path:
    if not (DIRECTORY / "tokenizer_config.json").exists():
        _need_source()
        write_directory(SOURCE, DIRECTORY)
    return DIRECTORY


def _default_ggufs() -> list[Path]:
    _need_source()
    if not BF16_GGUF.exists():
        write_bf16_gguf(SOURCE, BF16_GGUF)
    return [BF16_GGUF, SOURCE]


def _need_source() -> None:
    if not SOURCE.exists():
        sys.exit(f"{SOURCE} is missing; run `make model`, or name a model with --model")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
