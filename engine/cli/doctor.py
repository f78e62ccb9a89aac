"""`halimede doctor`: what this installation would run with, and what is broken."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halimede.engine.cli.completion import hub_cache
from halimede.engine.cli.doctor_kernels import find_kernels
from halimede.engine.cli.machine import (
    Findings,
    find_environment,
    find_folder,
    find_gpus,
    find_system,
    find_versions,
    format_bytes,
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation.

    Shows versions, the machine, what would be used and why, caches, environment.

    Exit status: 0, or 1 if something is broken; it then says what, and what to do.
    """
    sections, problems = examine()
    if as_json:
        print(json.dumps({**sections, "problems": problems}, indent=2, ensure_ascii=False))
    else:
        _print(sections, problems)
    if problems:
        raise typer.Exit(1)


def examine() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The facts by section, and what is broken."""
    findings = {"versions": find_versions(), "system": find_system()}
    torch_error = _try_torch()
    if torch_error is None:
        _add_torch_facts(findings["system"])
        findings |= {"gpu": find_gpus(), "choice": _find_choice(), "kernels": find_kernels()}
    else:
        findings["choice"] = Findings(problems=[torch_error])
    findings |= {"caches": _find_caches(), "environment": find_environment()}
    return (
        {name: found.facts for name, found in findings.items()},
        [problem for found in findings.values() for problem in found.problems],
    )


def _try_torch() -> str | None:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that it needs is absent
        return (
            f"torch cannot be imported ({type(error).__name__}: {error}); install it again: pip install torch"
        )
    return None


def _add_torch_facts(system: Findings) -> None:
    import torch

    from halimede.engine.runner.memory import available_memory

    system.facts["memory"] += f", {format_bytes(available_memory())} available"
    system.facts["torch threads"] = torch.get_num_threads()


def _find_choice() -> Findings:
    """What `auto` settings come to here."""
    import torch

    from halimede.engine.executor.device import (
        resolve_activation_dtype,
        resolve_device,
        resolve_dtype,
    )
    from halimede.engine.runner.memory import cpu_kv_bytes

    device = resolve_device("auto")
    facts: dict[str, Any] = {
        "device": f"{device} (" + ("a GPU is there)" if device.type == "cuda" else "no GPU)")
    }
    for name, checkpoint in (
        ("bfloat16 checkpoint", torch.bfloat16),
        ("float16 checkpoint", torch.float16),
    ):
        dtype = resolve_dtype("auto", checkpoint, device)
        computed = resolve_activation_dtype(dtype, device)
        fact = f"dtype of a {name}"
        facts[fact] = str(dtype).removeprefix("torch.")
        if computed != dtype:
            shown = str(computed).removeprefix("torch.")
            facts[fact] += f", computed in {shown} (this CPU has no arithmetic in it)"
    if device.type == "cpu":
        facts["KV cache"] = f"{format_bytes(cpu_kv_bytes())} (a share of the available memory)"
    facts["attention"] = (
        "torch's operations over the blocks of the KV cache" if device.type == "cpu" else "Triton kernels"
    )
    return Findings(facts)


def _find_caches() -> Findings:
    from huggingface_hub import get_token

    found = find_folder("hugging face", hub_cache(), "HF_HOME")
    triton = _triton_cache()
    if triton is not None:
        more = find_folder("triton", triton, "TRITON_CACHE_DIR")
        found.facts |= more.facts
        found.problems += more.problems
    found.facts["hub token"] = "present" if get_token() else "none (gated models need one: hf auth login)"
    return found


def _triton_cache() -> Path | None:
    try:
        from triton import knobs
    except ImportError:
        return None
    return Path(knobs.cache.dir)


def _print(sections: Mapping[str, Mapping[str, Any]], problems: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def say(text: str, style: str = "none") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    for title, facts in sections.items():
        say(title, "bold")
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            shown = " ".join(value) if isinstance(value, list) else value
            say(f"  {name:{width}}  {shown}")
        if not facts:
            say("  nothing set" if title == "environment" else "  not known")
    for problem in problems:
        say(f"broken: {problem}", "red")
    if not problems:
        say("Nothing is broken.", "green")
