"""The progress bar of an offline run: requests done, tokens read and written per second."""

from collections.abc import Callable
from typing import Any, Self

from halimede.engine.outputs import RequestOutput

UseTqdm = bool | Callable[..., Any]
"""True, False, or a class to use in tqdm's place."""


class GenerationProgress:
    """One tick per finished request; speeds are averages since the start."""

    def __init__(self, total: int, use_tqdm: UseTqdm) -> None:
        self._bar: Any = None
        self._input_tokens = self._output_tokens = 0
        if use_tqdm:
            from tqdm.auto import tqdm

            bar = use_tqdm if callable(use_tqdm) else tqdm
            self._bar = bar(
                total=total, desc="Processed prompts", dynamic_ncols=True, postfix=_speeds(0, 0, 1)
            )

    def add(self, output: RequestOutput) -> None:
        """Count a finished request."""
        if self._bar is None:
            return
        self._input_tokens += len(output.prompt_token_ids or ())
        self._output_tokens += sum(len(c.token_ids) for c in output.outputs)
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(_speeds(self._input_tokens, self._output_tokens, elapsed), refresh=False)
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:  # leave it as it stands
            self._bar.close()


def _speeds(input_tokens: int, output_tokens: int, seconds: float) -> str:
    return f"input: {input_tokens / seconds:.1f} tok/s, output: {output_tokens / seconds:.1f} tok/s"
