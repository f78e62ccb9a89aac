"""The offline front end: `LLM("model").generate(prompts)`. The engine runs in the caller's process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, get_args

from halimede.engine.build import build_core, open_model
from halimede.engine.chat import ContentFormat, Message, read_chat_template, render_chat
from halimede.engine.config import EngineConfig
from halimede.engine.generation_defaults import default_sampling_params, eos_token_ids
from halimede.engine.in_process import InProcessEngine
from halimede.engine.input_processor import InputLimits, InputProcessor, ProcessedRequest, Prompt
from halimede.engine.interrupt import defer_interrupts
from halimede.engine.output_processor import OutputProcessor
from halimede.engine.outputs import RequestOutput
from halimede.engine.progress import GenerationProgress, UseTqdm
from halimede.engine.request_window import GenerateRequest, Key, RequestWindow
from halimede.engine.tokenizer import load_tokenizer
from halimede.engine.vllm_options import drop_vllm_options
from halimede.errors import ConfigError, RequestError
from halimede.keywords import check_keywords
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
OnError = Literal["raise", "return"]
ParamsOrList = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to generate.

    model: a directory, a .gguf file or a Hugging Face id. `options` are the fields of EngineConfig, under
    vLLM's names. Raises ConfigError for an option that is unknown or does not fit, ModelLoadError for a
    checkpoint that cannot be loaded, KernelCacheError for kernels that jit="forbid" misses.

    max_model_len: tokens of the longest sequence. kernel_counters: what the kernel cache and the compiler had
    to do so far; None on a CPU.
    """

    def __init__(self, model: str, **options: Any) -> None:
        options = drop_vllm_options(options)
        check_keywords(options, EngineConfig.__dataclass_fields__, "LLM")
        self.config = EngineConfig(model=str(model), **options)
        self._chat_template = read_chat_template(self.config.chat_template)
        files, self.model_config = open_model(self.config)
        self._tokenizer = None if self.config.skip_tokenizer_init else load_tokenizer(self.config, files)
        self._defaults = SamplingParams()
        if self.config.generation_config == "auto":
            self._defaults = default_sampling_params(files.generation_config)
        eos = eos_token_ids(files, self.model_config, self._tokenizer)
        self._core, executor = build_core(self.config, files, self.model_config)
        self.max_model_len = executor.max_model_len
        self.kernel_counters = executor.kernel_counters
        self._inputs = InputProcessor(
            self._tokenizer,
            eos,
            InputLimits(self.model_config.vocab_size, executor.max_model_len, self.config.max_logprobs),
            self.config.seed,
        )
        self._outputs = OutputProcessor(self._tokenizer)
        self._engine = InProcessEngine(self._core, self._inputs, self._outputs)
        self._profiling = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsOrList = None,
        *,
        use_tqdm: UseTqdm = True,
        priority: Sequence[int] | int | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Complete every prompt; the results are in the order of the prompts.

        prompts: one or a list of: text, {"prompt": ...}, {"prompt_token_ids": [...]}, a list of token ids.
        sampling_params: for all, or one per prompt; None takes the model's recommended defaults.
        priority: for all, or one per prompt; lower runs first under scheduling_policy="priority".
        on_error: "raise" checks every prompt before the first one runs and raises RequestError if any is
            not valid; should one fail while running, the others finish first and are in the error's
            `outputs`. "return" puts a RequestOutput with `error` set in the place of each that failed.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm, priority, on_error, special=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: ParamsOrList = None,
        use_tqdm: UseTqdm = True,
        *,
        priority: Sequence[int] | int | None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        The parameters are those of generate() and halimede.engine.chat.render_chat.
        """
        many = bool(messages) and isinstance(messages[0], Sequence)
        conversations = cast("Sequence[Sequence[Message]]", messages if many else [messages])
        self.get_tokenizer()  # without one no conversation can be rendered
        prompts: list[Prompt | RequestError] = []
        for conversation in conversations:
            try:
                rendered = self.render_chat(
                    conversation,
                    chat_template=chat_template,
                    content_format=chat_template_content_format,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    template_kwargs=chat_template_kwargs,
                )
                prompts.append(rendered)
            except RequestError as error:
                prompts.append(error)
        return self._generate(prompts, sampling_params, use_tqdm, priority, on_error, special=False)

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt of a conversation; it spells its special tokens out, so tokenize it without adding any.

        options: as for halimede.engine.chat.render_chat.
        """
        try:
            options["chat_template"] = read_chat_template(options.get("chat_template")) or self._chat_template
        except ConfigError as error:
            raise RequestError(str(error)) from error
        return render_chat(self.get_tokenizer(), messages, **options)

    def as_completed(
        self, requests: Iterable[GenerateRequest[Key]], *, max_pending: int | None = None
    ) -> Iterator[tuple[Key, RequestOutput]]:
        """Complete requests from any iterable, however long, and yield (key, result) as each finishes.

        requests: read as there is room, so a generator that reads a file needs no more memory than its
            requests under way. A request that is refused or fails gives a result with `error` set.
        max_pending: prompts in the engine at once; None is twice max_num_seqs, so that none waits for input.

        Leaving the loop aborts what runs. Raises RequestError for a max_pending below 1.
        """
        limit = 2 * self.config.max_num_seqs if max_pending is None else max_pending
        if limit < 1:
            raise RequestError(f"max_pending={max_pending} must be at least 1")
        return self._run_lazily(RequestWindow(self._engine, requests, self._defaults, limit))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt and yield its state after each step, the last one finished.

        What each output holds is up to sampling_params.output_kind. Leaving the loop aborts the request.
        add_special_tokens: False for a prompt from render_chat.
        """
        params = sampling_params or self._defaults
        submitted: list[ProcessedRequest] = []
        outputs: list[RequestOutput] = []
        with self._profiled():
            try:
                with defer_interrupts():
                    processed = self._engine.submit(prompt, params, add_special_tokens=add_special_tokens)
                    submitted.append(processed)
                while not (outputs and outputs[-1].finished):
                    outputs = self._engine.step_for([processed.request_id])
                    for output in outputs:
                        if output.error is not None:
                            raise output.error
                        yield output
            finally:
                self._engine.abandon(submitted)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer. RequestError with skip_tokenizer_init=True."""
        if self._tokenizer is None:
            raise RequestError("this engine has no tokenizer: it was made with skip_tokenizer_init=True")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of what generate() and chat() use when none are given: the model's recommendation."""
        return self._defaults.replace()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        return self._core.reset_prefix_cache()

    def start_profile(self, folder: str | None = None) -> None:
        """Record what the engine runs with torch's profiler. folder: for the trace; None is config.profile.

        ConfigError without a folder, for one that cannot be written to, and if a record is being made.
        """
        folder = folder or self.config.profile
        if folder is None:
            raise ConfigError("no folder for the profile: give start_profile a folder, or set profile")
        self._core.start_profile(folder)
        self._profiling = True

    def stop_profile(self) -> str:
        """Write the trace, for https://ui.perfetto.dev; its path. ConfigError if no record is being made."""
        self._profiling = False
        return self._core.stop_profile()

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Record what is run inside, if the configuration asks for it and nobody does already."""
        if self.config.profile is None or self._profiling:
            yield
            return
        self.start_profile()
        try:
            yield
        finally:
            self.stop_profile()

    def shutdown(self) -> None:
        """Free the model and the KV cache; the LLM cannot be used again."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _generate(
        self,
        prompts: Sequence[Prompt | RequestError],
        sampling_params: ParamsOrList,
        use_tqdm: UseTqdm,
        priority: Sequence[int] | int | None,
        on_error: OnError,
        special: bool,
    ) -> list[RequestOutput]:
        """generate() for prompts of which some may have turned out to be errors already."""
        count = len(prompts)
        if on_error not in get_args(OnError):
            raise RequestError(f"on_error={on_error!r} is not one of: {', '.join(get_args(OnError))}")
        chosen = self._defaults if sampling_params is None else sampling_params
        params = _one_each(chosen, SamplingParams, count, "sampling_params")
        priorities = _one_each(0 if priority is None else priority, int, count, "priority")
        requests = [
            GenerateRequest(prompts[i], params[i], i, priorities[i], add_special_tokens=special)
            for i in range(count)
        ]
        results: list[RequestOutput | None] = [None] * count
        errors: list[tuple[int, RequestError]] = []

        def take(index: int, output: RequestOutput) -> None:
            results[index] = output
            if output.error is not None:
                errors.append((index, output.error))

        with self._profiled(), RequestWindow(self._engine, requests, self._defaults) as window:
            for index, output in window.fill():
                take(index, output)
            if errors and on_error == "raise":
                raise _summary(errors, count)
            with GenerationProgress(count - len(errors), use_tqdm) as progress:
                for index, output in window:
                    take(index, output)
                    progress.add(output)
        if errors and on_error == "raise":
            raise _summary(errors, count, [None if r is None or r.error else r for r in results])
        return cast("list[RequestOutput]", results)

    def _run_lazily(self, window: RequestWindow[Key]) -> Iterator[tuple[Key, RequestOutput]]:
        with self._profiled(), window:
            yield from window


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt becomes a list; a list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    if listed and isinstance(listed[0], int):
        return [cast("list[int]", listed)]
    return cast("list[Prompt]", listed)


def _one_each(values: _T | Sequence[_T], kind: type[_T], count: int, name: str) -> list[_T]:
    """The same value for each prompt, or the list that was given."""
    if isinstance(values, kind):
        return [values] * count
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{name} is {values!r}; it must be {kind.__name__} or a list of them")
    listed = list(cast("Sequence[_T]", values))
    for value in listed:
        if not isinstance(value, kind):
            raise RequestError(f"{name} holds {value!r}; it must hold {kind.__name__} only")
    if len(listed) != count:
        raise RequestError(f"{len(listed)} {name} for {count} prompts; give one for all or one for each")
    return listed


def _summary(
    errors: list[tuple[int, RequestError]], total: int, outputs: Sequence[RequestOutput | None] = ()
) -> RequestError:
    """One error for all: the first one in words, the others by number."""
    errors = sorted(errors, key=lambda entry: entry[0])
    index, first = errors[0]
    if total == 1:
        return RequestError(str(first), outputs)
    others = f"; prompts {', '.join(str(i) for i, _ in errors[1:10])} failed too" if len(errors) > 1 else ""
    state = "the others are in this error's outputs" if outputs else "nothing was run"
    return RequestError(
        f"prompt {index} of {total}: {first}{others} ({state}; on_error='return' gives both)",
        outputs,
    )
