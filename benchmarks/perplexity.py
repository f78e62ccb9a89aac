"""What quantizing a plain checkpoint costs: the perplexity of one model in several forms, on a fixed text.

    python benchmarks/perplexity.py                     # SmolLM2-135M, from the GGUF of `make model`
    python benchmarks/perplexity.py --model DIR         # another plain checkpoint

The text is cut into windows; in each, every token but the first is predicted from those before it. It is
short: compare forms of one model with each other, not with what others publish. The GGUF's own weights have
4 bits in groups of 32, which its copy in bfloat16 still shows: int4 does better on them than on others.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_checkpoint import SOURCE, write_directory

from halimede import LLM, SamplingParams
from halimede.engine.loader.resolve import resolve_model
from halimede.engine.quant.online import online_scheme
from halimede.engine.quantize_checkpoint import quantize_checkpoint

TEXT = Path(__file__).parent / "data" / "perplexity.txt"


@dataclass(frozen=True)
class Variant:
    """method: None is the model as it is. group_size, symmetric: of int4."""

    title: str
    method: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None


VARIANTS = (
    Variant("plain"),
    Variant("int8 (W8A8)", "int8"),
    Variant("fp8", "fp8"),
    *(Variant(f"int4 g{size}", "int4", size) for size in (128, 64, 32)),
    Variant("int4 g32 symmetric", "int4", 32, True),
)


def perplexity(model: Path, dtype: str, window: int, most: int) -> tuple[float, float]:
    """exp of the mean negative log-probability of the tokens, and the seconds without loading."""
    with LLM(str(model), dtype=dtype, device="cpu", max_model_len=window + 1, max_num_seqs=4) as llm:
        ids = llm.get_tokenizer().encode(TEXT.read_text(), add_special_tokens=False)
        windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)][:most]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": each} for each in windows], params, use_tqdm=False)
        seconds = time.perf_counter() - start
    losses = [
        -at[token].logprob
        for output in outputs
        for token, at in zip(output.prompt_token_ids or (), output.prompt_logprobs or (), strict=True)
        if at is not None
    ]
    return math.exp(sum(losses) / len(losses)), seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a plain checkpoint; default: the demo model's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--most-windows", type=int, default=1000)
    parser.add_argument("--only", nargs="*", help="beginnings of titles")
    options = parser.parse_args(arguments)
    print(
        "| weights | MB of tensors | perplexity | beside plain | s |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or write_directory(SOURCE, Path(temporary) / "plain")
        first = None
        for i, variant in enumerate(VARIANTS):
            if options.only and i and not variant.title.startswith(tuple(options.only)):
                continue
            folder = model
            if variant.method is not None:
                scheme = online_scheme(
                    variant.method, group_size=variant.group_size, symmetric=variant.symmetric
                )
                folder = Path(temporary) / "quantized"
                quantize_checkpoint(resolve_model(str(model)), scheme, folder, overwrite=True)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
            value, seconds = perplexity(folder, options.dtype, options.window, options.most_windows)
            first = first or value
            print(
                f"| {variant.title} | {size:.0f} | {value:.2f} | {100 * (value / first - 1):+.1f} % "
                f"| {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
