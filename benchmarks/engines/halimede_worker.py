"""Halimede, through `LLM.generate`."""

from typing import Any

from protocol import Engine, check_counts, serve


class HalimedeEngine(Engine):
    """The whole batch is given to one call; the engine batches continuously."""

    def import_packages(self) -> None:
        import torch
        import transformers

        from halimede.engine import llm

        self._llm, self._torch, self._transformers = llm, torch, transformers

    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        import halimede
        from halimede.engine.runner.kv_cache import KVCacheSpec

        settings = {
            "dtype": options["dtype"],
            "enable_prefix_caching": options["prefix_cache"],
            "max_model_len": options["max_model_len"],
            "max_num_seqs": options["max_num_seqs"],
            "num_gpu_blocks_override": 1 + -(-options["kv_tokens"] // 16),
            "block_size": 16,
            **options.get("extra", {}),
        }
        self._engine = self._llm.LLM(options["model"], **settings)
        dtype = getattr(self._torch, settings["dtype"])
        spec = KVCacheSpec.from_model(
            self._engine.model_config, dtype=dtype, block_size=settings["block_size"]
        )
        return {
            "versions": {
                "halimede": halimede.__version__,
                "torch": self._torch.__version__,
                "transformers": self._transformers.__version__,
            },
            "settings": settings,
            "threads": self._torch.get_num_threads(),
            "kv_cache_mib": settings["num_gpu_blocks_override"] * spec.bytes_per_block / (1 << 20),
        }

    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool) -> list[list[int]] | None:
        from halimede import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self._engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        new = [list(output.outputs[0].token_ids) for output in outputs]
        check_counts([len(ids) for ids in new], max_tokens)
        return new if want_ids else None


if __name__ == "__main__":
    serve(HalimedeEngine)
