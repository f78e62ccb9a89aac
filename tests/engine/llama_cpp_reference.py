"""What llama.cpp generates in float32: the oracle of the real Gemma 3, through the package xllamacpp.

llama.cpp rounds activations to 8 bits where weights are quantized, so it is given the same model with every
tensor dequantized to float32. To make the reference anew (`make install` brings xllamacpp):

    .venv/bin/python tests/engine/llama_cpp_reference.py .models/gemma-3-270m-Q4_K_M.gguf
"""

import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np

from halimede.engine.loader.gguf_reader import CheckedReader

NEW_TOKENS = 32
REFERENCE = Path(__file__).parent / "gemma3_tokens.json"
# The last one is longer than the model's sliding window of 512 tokens.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Die Hauptstadt von Deutschland ist",
    "".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(1, 40)) + "Line 40:",
)


def write_float32_gguf(source: Path, path: Path) -> Path:
    """The same model with every tensor in float32.

    The metadata are copied as bytes: gguf's own writer takes 20 s for a vocabulary of 262,144.
    """
    reader = CheckedReader(source)
    infos, offset = b"", 0
    for tensor in reader.tensors:
        name, shape = tensor.name.encode(), tensor.shape.tolist()
        infos += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", gguf.GGMLQuantizationType.F32, offset)
        offset += _padded(4 * tensor.n_elements, reader.alignment)
    with path.open("wb") as file:
        file.write(reader.data[: reader.tensors[0].field.offset].tobytes() + infos)
        for tensor in reader.tensors:
            file.seek(_padded(file.tell(), reader.alignment))
            _dequantize(tensor).tofile(file)
    return path


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _dequantize(tensor: Any) -> np.ndarray:
    """gguf's own arithmetic; it takes 16 rows at a time, so they are made long first."""
    data = tensor.data
    rows, width = (1, data.shape[0]) if data.ndim == 1 else data.shape
    joined = next(n for n in (256, 64, 16, 4, 1) if rows % n == 0)
    wide = gguf.quants.dequantize(data.reshape(rows // joined, joined * width), tensor.tensor_type)
    return wide.reshape(*data.shape[:-1], -1)


class LlamaCpp:
    """A model in llama.cpp: float32 weights, keys and values, no flash attention.

    One thread: two are busy while they wait for each other, for minutes where other tests want the cores too.
    """

    def __init__(self, path: Path, context: int = 2048) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str) -> list[int]:
        """Token ids, special tokens recognized, the beginning-of-text token first."""
        body = {"content": text, "add_special": True, "parse_special": True}
        request = Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids

    def generate(self, prompt_token_ids: list[int], n: int) -> tuple[list[int], list[float]]:
        """n greedy tokens and the log-probability of each."""
        result = self._server.handle_completions(
            {"prompt": prompt_token_ids, "max_tokens": n, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        )
        entries = result["choices"][0]["logprobs"]["content"]
        return [entry["id"] for entry in entries], [entry["logprob"] for entry in entries]

    def next_tokens(self, token_ids: list[int]) -> list[int]:
        """The most probable token after each beginning of token_ids, which are read one by one."""
        found = []
        for end in range(1, len(token_ids) + 1):
            request = {"prompt": token_ids[:end], "max_tokens": 1, "temperature": 0, "logprobs": 1}
            result = self._server.handle_completions({**request, "ignore_eos": False, "cache_prompt": True})
            found.append(int(result["choices"][0]["logprobs"]["content"][0]["id"]))
        return found


def make_reference(llama_cpp: LlamaCpp, new_tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
    """For each of PROMPTS its token ids, and the tokens and log-probabilities that follow."""
    entries = []
    for prompt in PROMPTS:
        prompt_token_ids = llama_cpp.tokenize(prompt)
        token_ids, logprobs = llama_cpp.generate(prompt_token_ids, new_tokens)
        entries.append(
            {
                "prompt": prompt,
                "prompt_token_ids": prompt_token_ids,
                "token_ids": token_ids,
                "logprobs": [round(logprob, 5) for logprob in logprobs],
            }
        )
    return entries


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        model = LlamaCpp(write_float32_gguf(Path(sys.argv[1]), Path(directory) / "float32.gguf"))
        lines = ",\n".join(map(json.dumps, make_reference(model)))
    REFERENCE.write_text(f"[\n{lines}\n]\n")
