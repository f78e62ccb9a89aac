"""The types of a GGUF that stay quantized. Apart from what reads them, which imports torch."""

from typing import Literal, get_args

GgufType = Literal["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"]
KEPT_TYPES: tuple[GgufType, ...] = get_args(GgufType)
