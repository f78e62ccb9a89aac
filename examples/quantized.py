"""Write a model in 4 bits, and hold the answer of the quantized model beside the plain one's.

python examples/quantized.py [MODEL]

MODEL is a plain checkpoint: a directory or a Hugging Face id. Without one, the chat model that `make model`
fetches is dequantized first (its own 4-bit weights would be kept as they are).

From a shell: halimede quantize MODEL --to int4 -o DIR, then halimede generate DIR "..."
Without writing anything: LLM(MODEL, quantization="int4"), or "int8", or "fp8".
"""

import sys
import tempfile
from pathlib import Path

from halimede import LLM, SamplingParams
from halimede.engine.loader.resolve import resolve_model
from halimede.engine.quant.online import online_scheme
from halimede.engine.quantize_checkpoint import quantize_checkpoint

folder = Path(tempfile.mkdtemp())
if len(sys.argv) > 1:
    model = sys.argv[1]
else:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from make_checkpoint import SOURCE, write_directory

    model = str(write_directory(SOURCE, folder / "plain"))

scheme = online_scheme("int4", group_size=32)
quantized = folder / "int4"
quantize_checkpoint(resolve_model(model), scheme, quantized, overwrite=False, progress=True)

question = [{"role": "user", "content": "What is the capital of France?"}]
params = SamplingParams(temperature=0, max_tokens=32)
for title, path in (("plain", model), ("int4", str(quantized))):
    with LLM(path, max_model_len=512) as llm:
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / (1 << 20)
        print(f"{title} ({size:.0f} MiB):", llm.chat(question, params, use_tqdm=False)[0].outputs[0].text)
