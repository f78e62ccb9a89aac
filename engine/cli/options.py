"""Command-line options made from the fields of EngineConfig, so that none is listed twice."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from halimede.engine.config import EngineConfig

ENGINE_FIELDS = tuple(f for f in dataclasses.fields(EngineConfig) if f.name != "model")


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every engine setting as an option; it receives those that were set as `engine`."""
    hints = get_type_hints(EngineConfig)
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "engine"]
    options = [_option(f, hints[f.name]) for f in ENGINE_FIELDS]

    def run(**values: Any) -> None:
        engine = {f.name: values.pop(f.name) for f in ENGINE_FIELDS}
        command(**values, engine=changed_options(engine))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return run


def changed_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    defaults = {f.name: f.default for f in ENGINE_FIELDS}
    return {name: value for name, value in values.items() if value != defaults[name]}


def _option(field: "dataclasses.Field[Any]", hint: Any) -> inspect.Parameter:
    flag = "--" + field.name.replace("_", "-")
    flags = f"{flag}/--no-{flag[2:]}" if hint is bool else flag
    option = typer.Option(flags, help=field.metadata["help"], rich_help_panel="Engine")
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[_plain(hint), option],
    )


def _plain(hint: Any) -> Any:
    """A type that typer knows: a Literal is a string here and is checked by EngineConfig itself."""
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if type(None) in get_args(hint):
        return Union[tuple(_plain(a) if a is not type(None) else a for a in get_args(hint))]  # noqa: UP007
    return hint
