"""vLLM on a CPU, through `LLM.generate`."""

from typing import Any

from protocol import Engine, check_counts, serve


class VllmEngine(Engine):
    """Its core runs in a process of its own, whose memory is counted too."""

    def import_packages(self) -> None:
        import torch
        import vllm
        from vllm import LLM, SamplingParams

        self._vllm, self._torch, self._loader, self._params = vllm, torch, LLM, SamplingParams

    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        settings = {
            "dtype": options["dtype"],
            "enable_prefix_caching": options["prefix_cache"],
            "max_model_len": options["max_model_len"],
            "max_num_seqs": options["max_num_seqs"],
            "disable_log_stats": True,
            **options.get("extra", {}),
        }
        self._engine = self._loader(options["model"], **settings)
        versions = {"vllm": self._vllm.__version__, "torch": self._torch.__version__}
        return {"versions": versions, "settings": settings}

    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool) -> list[list[int]] | None:
        params = self._params(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self._engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        new = [list(output.outputs[0].token_ids) for output in outputs]
        check_counts([len(ids) for ids in new], max_tokens)
        return new if want_ids else None


if __name__ == "__main__":
    serve(VllmEngine)
