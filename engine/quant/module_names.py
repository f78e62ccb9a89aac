"""Whether a module is on a checkpoint's list of modules, however the checkpoint calls it."""

import re
from collections.abc import Iterable


def spellings(name: str) -> tuple[str, ...]:
    """A module's name as the model has it, and as models that also see call it in their lists."""
    outer = (f"model.language_model.{name.removeprefix('model.')}",) if name.startswith("model.") else ()
    return name, f"language_model.{name}", *outer


def is_listed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a list such as modules_to_not_convert has the module or one that it lies in.

    An entry is a whole name ("model.layers.0"), the end of one ("lm_head", "self_attn.q_proj") or something
    between ("mlp.gate", which is not "mlp.gate_proj"); a * stands for anything.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    wanted = re.escape(pattern.strip(".")).replace(r"\*", ".*")
    return any(re.search(rf"(^|\.){wanted}($|\.)", spelling) for spelling in spellings(name))
