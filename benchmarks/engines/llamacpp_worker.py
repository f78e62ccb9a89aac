"""llama.cpp, through xllamacpp: its server's slots in this process, which batch continuously."""

from typing import Any

from protocol import Engine, check_counts, serve


class LlamaCppEngine(Engine):
    """One slot per sequence that may run at once; all prompts are given to one call."""

    def import_packages(self) -> None:
        import xllamacpp

        self._package = xllamacpp

    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        params = self._package.CommonParams()
        params.model.path = options["model"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
        params.n_parallel = options["max_num_seqs"]
        params.n_ctx = options["kv_tokens"]
        params.cache_prompt = options["prefix_cache"]
        params.cache_ram_mib = 0  # no second cache of what slots have held
        params.fit_params = False
        params.verbosity = 0
        self._cache_prompt = options["prefix_cache"]
        self._server = self._package.Server(params)
        return {
            "versions": {"xllamacpp": self._package.__version__},
            "settings": {"n_parallel": params.n_parallel, "n_ctx": params.n_ctx, "n_ubatch": params.n_ubatch},
            "threads": options["threads"],
            "build": self._package.get_system_info().strip(),
        }

    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool) -> list[list[int]] | None:
        request = {
            "prompt": prompts,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": self._cache_prompt,
        }
        if want_ids:
            request["logprobs"] = 1  # the only way to get token ids, and it costs time
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answers {answer}")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice["finish_reason"] != "length" for choice in choices) or len(choices) != len(prompts):
            raise RuntimeError(f"llama.cpp stopped early: {[c['finish_reason'] for c in choices]}")
        if not want_ids:
            return None
        new = [[token["id"] for token in choice["logprobs"]["content"]] for choice in choices]
        check_counts([len(ids) for ids in new], max_tokens)
        return new


if __name__ == "__main__":
    serve(LlamaCppEngine)
