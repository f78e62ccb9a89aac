"""Complete a few prompts offline. A vLLM script runs the same way: only the import differs.

python examples/offline.py [MODEL]
"""

import sys

from halimede import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
prompts = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was a",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, repetition_penalty=1.1)

llm = LLM(model=model, max_model_len=1024)
for output in llm.generate(prompts, sampling_params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
