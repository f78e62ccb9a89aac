"""Command-line options made from the fields of EngineConfig and SamplingParams, so none is listed twice."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from halimede.engine.config import EngineConfig
from halimede.scheduler.sampling_params import SamplingParams

_NOT_OPTIONS = ("model", "skip_tokenizer_init")  # an argument; a command line is about text
_ENGINE = {f.name: f for f in dataclasses.fields(EngineConfig) if f.name not in _NOT_OPTIONS}

# Sampling fields that make sense for one prompt at a terminal: flag and help.
_SAMPLING = {
    "max_tokens": ("--max-tokens", "Most new tokens; default: up to max-model-len."),
    "temperature": ("--temperature", "0 is greedy."),
    "top_p": ("--top-p", "Nucleus mass."),
    "top_k": ("--top-k", "0 is all tokens."),
    "min_p": ("--min-p", "Fraction of the top probability."),
    "repetition_penalty": ("--repetition-penalty", "Above 1 discourages repetition."),
    "presence_penalty": ("--presence-penalty", "Above 0 discourages tokens that have come."),
    "frequency_penalty": ("--frequency-penalty", "Above 0 discourages tokens by how often they have come."),
    "seed": ("--sampling-seed", "Makes the answer reproducible."),
    "stop": ("--stop", "End at this string; may be repeated."),
    "ignore_eos": ("--ignore-eos", "Go on after the end-of-sequence token."),
}
_SAMPLING_PANEL = "Sampling (default: what the model recommends)"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each engine setting and for the usual sampling parameters.

    It receives those that were set as the dicts `engine` and `sampling`.
    """
    generated = [*_sampling_options(), *_engine_options()]
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("engine", "sampling")]

    def run(**values: Any) -> None:
        engine = {n: v for n, f in _ENGINE.items() if (v := values.pop(n)) != f.default}
        sampling = {n: v for n in _SAMPLING if (v := values.pop(f"sampling_{n}")) is not None}
        command(**values, engine=engine, sampling=sampling)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *generated])  # type: ignore[attr-defined]
    return run


def _engine_options() -> list[inspect.Parameter]:
    hints = get_type_hints(EngineConfig)
    options = []
    for name, field in _ENGINE.items():
        flag = name.replace("_", "-")
        flags = f"--{flag}/--no-{flag}" if hints[name] is bool else f"--{flag}"
        option = typer.Option(flags, help=field.metadata["help"], rich_help_panel="Engine")
        options.append(_parameter(name, _plain(hints[name]), option, field.default))
    return options


def _sampling_options() -> list[inspect.Parameter]:
    hints = get_type_hints(SamplingParams)
    options = []
    for name, (flag, text) in _SAMPLING.items():
        hint = list[str] if name == "stop" else hints[name]
        option = typer.Option(flag, help=text, rich_help_panel=_SAMPLING_PANEL)
        options.append(_parameter(f"sampling_{name}", hint | None, option, None))
    return options


def _parameter(name: str, hint: Any, option: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[hint, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(hint: Any) -> Any:
    """A type that typer knows: a Literal is a string here and is checked by EngineConfig itself."""
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if type(None) in get_args(hint):
        return Union[tuple(_plain(a) if a is not type(None) else a for a in get_args(hint))]  # noqa: UP007
    return hint
