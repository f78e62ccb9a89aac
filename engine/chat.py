"""Messages to prompt: the model's own chat template, rendered by transformers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halimede.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""A message of a conversation: `role`, `content` (text, or a list of parts) and what a template may read."""

ContentFormat = Literal["auto", "string", "openai"]


def read_chat_template(source: str | None) -> str | None:
    """`source` if it is a template, the file's text if it is a path. ConfigError if it is neither."""
    if source is None or "{" in source:
        return source
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={source!r} is neither a Jinja template nor a readable file: {error}"
        ) from error


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    content_format: ContentFormat = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's prompt. RequestError for messages that the template refuses."""
    template = chat_template or _default_template(tokenizer)
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "add_generation_prompt=True starts a new message, but continue_final_message=True goes on with "
            "the last one; set one of them to False"
        )
    _check_messages(messages)
    as_text = content_format == "string" or (content_format == "auto" and not _reads_parts(template))
    conversation = [_with_text_content(m) if as_text else dict(m) for m in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation,
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        )
    # A template may raise anything: its own raise_exception, undefined fields, type errors.
    except Exception as error:
        raise RequestError(f"the chat template cannot render these messages: {error}") from error


def _default_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise RequestError(
            "this model has no chat template; pass chat_template=... (a Jinja template or the path of one), "
            "or use generate() with a plain prompt"
        )
    return str(template)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise RequestError("the conversation is empty; give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"message {index} is {message!r}; it must be a dict with a 'role' (user, assistant, system, "
                "tool) and a 'content'"
            )


def _with_text_content(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"message content of type {kind!r} is not supported; use text parts")
    return {**message, "content": "\n".join(texts)}


@lru_cache(maxsize=16)  # a list of conversations has one template
def _reads_parts(template: str) -> bool:
    """Whether the template loops over a message's content, so that it wants parts and not a string."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:
        return False  # a tag of transformers' own; rendering will tell if the template is really broken
    for loop in tree.find_all(nodes.For):
        source = loop.iter
        if isinstance(source, nodes.Getitem) and isinstance(source.arg, nodes.Const):
            if source.arg.value == "content":
                return True
        elif isinstance(source, nodes.Getattr) and source.attr == "content":
            return True
    return False
