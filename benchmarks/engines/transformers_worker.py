"""transformers: `generate` on a static batch, padded on the left, with SDPA attention."""

from typing import Any

from protocol import Engine, check_counts, serve


class TransformersEngine(Engine):
    """No paged cache and no scheduler: the batch ends when its last row ends."""

    def import_packages(self) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        self._torch, self._transformers, self._loader = torch, transformers, AutoModelForCausalLM

    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        dtype = getattr(self._torch, options["dtype"])
        model = self._loader.from_pretrained(options["model"], dtype=dtype, attn_implementation="sdpa")
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None
        return {
            "versions": {"torch": self._torch.__version__, "transformers": self._transformers.__version__},
            "settings": {"dtype": options["dtype"], "attn_implementation": "sdpa"},
            "threads": self._torch.get_num_threads(),
        }

    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool) -> list[list[int]] | None:
        torch, width = self._torch, max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            )
        new: list[list[int]] = output[:, width:].tolist()
        check_counts([len(row) for row in new], max_tokens)
        return new if want_ids else None


if __name__ == "__main__":
    serve(TransformersEngine)
