"""What the package promises before any model is loaded: its names, its imports, its sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

import halimede

PUBLIC = """
    LLM CompletionOutput ConfigError EngineConfig EngineDeadError GenerateRequest HalimedeError Logprob
    ModelLoadError RequestError RequestOutput RequestOutputKind SamplingParams TextPrompt TokensPrompt
    UnsupportedModelError UnsupportedQuantizationError __version__
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_public_names_are_exactly_these() -> None:
    assert halimede.__all__ == PUBLIC.split()
    assert dir(halimede) == sorted(halimede.__all__)
    for name in halimede.__all__:
        assert getattr(halimede, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        halimede.Nope  # noqa: B018


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("halimede", "torch transformers triton numpy typer"),
        ("halimede.scheduler.scheduler", "torch transformers triton numpy"),
        ("halimede.engine.cli.main", "torch transformers triton"),
    ],
)
def test_imports_stay_light(imported: str, absent: str) -> None:
    loaded = run_python(f"import sys, {imported}; print(*sys.modules)").split()
    assert not set(absent.split()) & set(loaded)


def test_the_engine_imports_without_optional_parts() -> None:
    """Without each in turn; torch, which takes 2 s, is imported once."""
    printed = run_python("""
import sys
for blocked in ("triton", "gguf", "xformers", "typer"):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("halimede", "triton", "gguf", "xformers", "typer"):
            del sys.modules[name]
    sys.modules[blocked] = None
    import halimede.engine.llm
    assert sys.modules[blocked] is None
    print(blocked)
""")
    assert printed.split() == ["triton", "gguf", "xformers", "typer"]


def test_the_code_folders_are_not_importable_under_names_that_others_probe_for() -> None:
    root = Path(__file__).parent.parent
    for folder in ("engine", "kernels", "scheduler"):
        link = root / "src" / "halimede" / folder
        assert link.is_symlink()
        assert link.resolve() == root / folder
