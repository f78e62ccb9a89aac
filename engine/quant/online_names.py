"""What plain weights can be quantized to while they are loaded. Imports no torch."""

from typing import Literal, get_args

OnlineMethod = Literal["int4", "int8", "fp8"]
ONLINE_METHODS: tuple[OnlineMethod, ...] = get_args(OnlineMethod)
