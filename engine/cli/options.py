"""Command-line options made from the fields of EngineConfig and SamplingParams, so none is listed twice.

A command asks for them with `with_engine_options` or `with_options` and takes its model as `ModelArgument`.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from halimede.engine.cli.completion import complete_model
from halimede.engine.config import EngineConfig
from halimede.scheduler.sampling_params import SamplingParams

_NOT_OPTIONS = ("model", "skip_tokenizer_init")  # an argument; a command line is about text
_FIELDS = {f.name: f for f in dataclasses.fields(EngineConfig)}
_ENGINE = {name: field for name, field in _FIELDS.items() if name not in _NOT_OPTIONS}
_ENGINE_PANEL = "Engine"

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

ModelArgument = Annotated[
    str, typer.Argument(help=_FIELDS["model"].metadata["help"], autocompletion=complete_model)
]
"""Annotation of a command's model argument."""


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting of the engine.

    It receives those that differ from the defaults as the dict `engine`: keywords of LLM and EngineConfig.
    """
    return _with_generated(command, _engine_options(), engine=_pop_engine)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """with_engine_options, and an option for each of the usual sampling parameters.

    It receives those that were set as the dict `sampling`: keywords of SamplingParams.
    """
    options = [*_sampling_options(), *_engine_options()]
    return _with_generated(command, options, engine=_pop_engine, sampling=_pop_sampling)


def _with_generated(
    command: Callable[..., None],
    options: list[inspect.Parameter],
    **collect: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[..., None]:
    """`command` with `options` in its signature; what they say is collected into keywords of its own."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in collect]

    def run(**values: Any) -> None:
        collected = {name: pop(values) for name, pop in collect.items()}
        command(**values, **collected)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return run


def _pop_engine(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, field in _ENGINE.items() if (v := values.pop(name)) != field.default}


def _pop_sampling(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name in _SAMPLING if (v := values.pop(f"sampling_{name}")) is not None}


def _engine_options() -> list[inspect.Parameter]:
    hints = get_type_hints(EngineConfig)
    options = []
    for name, field in _ENGINE.items():
        hint, flag = hints[name], name.replace("_", "-")
        special: dict[str, Any] = {}
        flags = f"--{flag}/--no-{flag}" if hint is bool else f"--{flag}"
        if _is_mapping(hint):
            hint, special = str | None, {"parser": _parse_json_object, "metavar": "JSON"}
        text = field.metadata["help"]
        option = typer.Option(flags, help=text, rich_help_panel=_ENGINE_PANEL, **special)
        options.append(_parameter(name, hint, option, field.default))
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


def _is_mapping(hint: Any) -> bool:
    """Whether a field takes a dict; on the command line that is JSON, whatever else the field may take."""
    kinds = [get_origin(kind) or kind for kind in (hint, *get_args(hint))]
    return any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds)


def _parse_json_object(text: str) -> dict[str, Any]:
    """A usage error, to which the flag's name is added, for anything but a JSON object."""
    example = "'{\"rope_theta\": 10000}'"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not valid JSON ({error}); give an object such as {example}"
        ) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is JSON but not an object; give one such as {example}")
    return value
