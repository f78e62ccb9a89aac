"""transformers' generate on this GPU, to stand beside ours: bfloat16, sdpa, random weights, our geometry.

PYTHONPATH=src python benchmarks/gpu/transformers_generate.py --output transformers_generate.json
"""

import time
from typing import Any

import torch
from geometry import Geometry, choose_geometry
from stage import Results, stage_arguments
from timing import gpu_memory

BATCHES, CONTEXT, NEW_TOKENS = (1, 32), 1024, 64
REHEARSED_BATCHES, REHEARSED_CONTEXT, REHEARSED_NEW_TOKENS = (1, 2), 8, 3


def make_model(geometry: Geometry, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        k: v for k, v in geometry.config.items() if k not in ("architectures", "model_type", "torch_dtype")
    }
    config = AutoConfig.for_model(geometry.config["model_type"], **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def seconds_for(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Of one call of generate, greedy, which must give so many tokens."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert out.shape[1] == ids.shape[1] + new_tokens, "generate stopped early"
    return seconds


def measure(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """decode_tok_s leaves the prefill out: it is what more than one token takes."""
    seconds_for(model, ids, 2)
    first = seconds_for(model, ids, 1)
    whole = seconds_for(model, ids, new_tokens)
    batch = ids.shape[0]
    return {
        "batch": batch,
        "context": ids.shape[1],
        "new_tokens": new_tokens,
        "first_token_s": first,
        "tok_s": batch * new_tokens / whole,
        "decode_tok_s": batch * (new_tokens - 1) / (whole - first) if whole > first else None,
    }


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--geometry", help="a preset or a file; default llama-3-8b, on a CPU tiny")
    options = parser.parse_args()
    device = torch.device(options.device)
    rehearsed = device.type == "cpu"
    name = options.geometry or ("tiny" if rehearsed else "llama-3-8b")
    geometry, note = choose_geometry(name, gpu_memory(device))
    import transformers

    facts = {"geometry": geometry.name, "transformers": transformers.__version__}
    results = Results(options.output, device, **facts)
    if note:
        results.note(note)
    batches, context, new_tokens = BATCHES, CONTEXT, NEW_TOKENS
    if rehearsed:
        batches, context, new_tokens = REHEARSED_BATCHES, REHEARSED_CONTEXT, REHEARSED_NEW_TOKENS
    torch.manual_seed(0)
    with torch.inference_mode():
        model = make_model(geometry, device)
        for batch in batches:
            with results.attempt(f"batch {batch}"):
                ids = torch.randint(3, geometry.vocab_size, (batch, context), device=device)
                row = measure(model, ids, new_tokens)
                results.add("rows", row)
                print(f"batch {batch}: {row['tok_s']:.1f} tok/s, prefill included")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
