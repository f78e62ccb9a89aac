"""The format that docs/quantization.md adds in one file is one."""

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import Stored, check_quantized, write_quantized

from halimede.engine.quant import registry
from halimede.engine.quant.registry import METHODS, Method

DOCS = Path(__file__).parents[2] / "docs" / "quantization.md"


@dataclass(frozen=True)
class Tiny4:
    def __call__(self, name: str, weight: torch.Tensor) -> Stored | None:
        if name.endswith("v_proj"):
            return None
        scale = (weight.abs().amax(1) / 7).half()
        codes = (weight / scale.float()[:, None]).round().clamp(-8, 7) + 8
        packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        return Stored({"codes": packed, "scale": scale}, (codes - 8) * scale.float()[:, None])


def test_a_format_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    module = types.ModuleType("halimede.engine.quant.tiny4")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, vars(module))
    methods = eval(f"{{{line}}}", {"Method": Method})
    monkeypatch.setattr(registry, "METHODS", {**METHODS, **methods})
    monkeypatch.setattr(registry, "_BY_NAME", dict.fromkeys(methods, "tiny4"))
    config = {"quant_method": "tiny4", "modules_to_not_convert": ["v_proj", "lm_head"]}
    check_quantized(write_quantized(tmp_path, config, Tiny4(), shards=2))
