"""Answer a file of requests, in the format of OpenAI's batches, and write a file of results.

python examples/batch.py [MODEL]

The same from a shell: halimede batch -i requests.jsonl -o results.jsonl --model MODEL
"""

import json
import sys
import tempfile
from pathlib import Path

from halimede import LLM
from halimede.engine.batch.run import run_batch

model = sys.argv[1] if len(sys.argv) > 1 else ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
folder = Path(tempfile.mkdtemp())
requests, results = folder / "requests.jsonl", folder / "results.jsonl"

with requests.open("w") as file:
    for country in ("France", "Japan", "Egypt"):
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        body = {"messages": messages, "max_tokens": 24, "temperature": 0}
        line = {"custom_id": country, "method": "POST", "url": "/v1/chat/completions", "body": body}
        file.write(json.dumps(line) + "\n")

with LLM(model=model, max_model_len=1024) as llm:
    summary = run_batch(llm, requests, results)  # after an interruption, the same call goes on

for line in map(json.loads, results.open()):
    if line["error"]:
        print(line["custom_id"], "failed:", line["error"]["message"])
    else:
        print(line["custom_id"], "->", line["response"]["body"]["choices"][0]["message"]["content"])
print(f"{summary.num_lines} requests, {summary.output_tokens} tokens in {results}")
