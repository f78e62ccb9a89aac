"""`halimede chat MODEL`: a conversation in the terminal, or one message per line from a pipe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.answer import has_chat_template, stream_answer
from halimede.engine.cli.chat_commands import COMMANDS, Conversation, LeaveChat, run_command, unquote
from halimede.engine.cli.chat_input import MessageSource, open_messages
from halimede.engine.cli.options import ModelArgument
from halimede.engine.cli.terminal import complain, notice, replace_what_cannot_be_encoded
from halimede.engine.config import EngineConfig
from halimede.errors import ConfigError, EngineDeadError, HalimedeError, RequestError
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from halimede.engine.llm import LLM


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Remember what was typed for the next time.")
    ] = True,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk with a model. Answers go to standard output as they are generated, the rest to standard error.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat. A message of several lines stands
    between triple quotes, or has a backslash at the end of each line but the last. Where standard input is
    not a terminal, each of its lines is a message; the exit status is then 1 if one of them failed.
    """
    replace_what_cannot_be_encoded()
    # Bad values are told before the model is loaded.
    SamplingParams(**sampling)
    EngineConfig(model=model, **engine)

    from halimede import LLM

    with LLM(model, **engine) as llm:
        if not has_chat_template(llm):
            raise ConfigError(
                f"{model} has no chat template, so there is no saying how it marks who speaks; pass "
                f"--chat-template, or let it continue a text: halimede generate {model} PROMPT --raw"
            )
        changes = {"max_tokens": None, **sampling, "output_kind": RequestOutputKind.DELTA}
        conversation = Conversation(llm.get_default_sampling_params().replace(**changes), system)
        words = [name + " " * bool(command.argument) for command in COMMANDS for name in command.names]
        messages = open_messages(words, keep_history=history)
        if messages.interactive:
            notice(f"{model}: up to {llm.max_model_len} tokens. /help lists the commands.")
        if _talk(llm, conversation, messages) and not messages.interactive:
            raise typer.Exit(1)


def _talk(llm: "LLM", conversation: Conversation, messages: MessageSource) -> int:
    """Answer until the messages end; returns how many could not be answered."""
    failed = 0
    while True:
        try:
            text = messages.read()
            if text.startswith("/"):
                notice(run_command(conversation, text), style="none")
            else:
                _answer(llm, conversation, unquote(text), messages.interactive)
        except (EOFError, LeaveChat):
            return failed
        except EngineDeadError:
            raise
        except KeyboardInterrupt:  # while the message was prepared
            if not messages.interactive:
                raise
            notice("[stopped]")
        except HalimedeError as error:
            complain(error)
            failed += 1


def _answer(llm: "LLM", conversation: Conversation, text: str, interactive: bool) -> None:
    """One turn. The conversation stays as it was if it fails, or is stopped before anything was said."""
    prompt = llm.render_chat(conversation.messages(text))
    token_ids = llm.get_tokenizer().encode(prompt, add_special_tokens=False)
    if len(token_ids) >= llm.max_model_len:
        raise _too_long(len(token_ids), llm.max_model_len, bool(conversation.turns))
    rendered = {"prompt": prompt, "prompt_token_ids": token_ids}
    answer = stream_answer(llm, rendered, conversation.params, add_special_tokens=False)
    if answer.interrupted and not interactive:
        raise KeyboardInterrupt
    notice(answer.describe())
    if answer.text or not answer.interrupted:
        conversation.add(text, answer.text)
    if answer.num_prompt_tokens + answer.num_tokens >= llm.max_model_len:
        notice(
            f"The conversation has filled the {llm.max_model_len} tokens of max_model_len; /reset forgets it."
        )


def _too_long(num_tokens: int, limit: int, has_turns: bool) -> RequestError:
    what = "the conversation with this message" if has_turns else "the message"
    remedy = "/reset forgets the conversation" if has_turns else "shorten it"
    return RequestError(
        f"{what} has {num_tokens} tokens and max_model_len is {limit}, which must hold the answer too; "
        f"{remedy}, or start with a larger --max-model-len"
    )
