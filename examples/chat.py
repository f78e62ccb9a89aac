"""Two turns of a conversation, the second one streamed.

python examples/chat.py [MODEL]
"""

import sys

from halimede import LLM, RequestOutputKind, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
llm = LLM(model=model, max_model_len=2048)

messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)[0]
print("assistant:", answer.outputs[0].text)

messages += [
    {"role": "assistant", "content": answer.outputs[0].text},
    {"role": "user", "content": "And what is it famous for?"},
]
params = SamplingParams(temperature=0, max_tokens=48, output_kind=RequestOutputKind.DELTA)
print("assistant: ", end="")
for output in llm.stream(llm.render_chat(messages), params, add_special_tokens=False):
    for completion in output.outputs:
        print(completion.text, end="", flush=True)
print(f"\n({output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens came from the cache)")
