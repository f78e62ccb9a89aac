"""The straightforward sampler that the real one is held against: one row, in float64, plain Python."""

import math

from halimede.engine.runner.row_table import RowTable, StepPlan
from halimede.scheduler.output import NewSequence, ScheduledSequence, SchedulerOutput
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams


def new_sequence(
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> NewSequence:
    """A sequence as the scheduler would describe it."""
    request = Request(
        "r",
        prompt,
        params,
        seed=seed,
        arrival_time=0.0,
        eos_token_ids=frozenset(eos),
        bad_words_token_ids=bad_words,
    )
    return NewSequence(request, prompt + output, len(prompt))


def plan_of(news: list[NewSequence], vocab_size: int) -> tuple[StepPlan, RowTable]:
    """A step that samples from each of these sequences."""
    table = RowTable(len(news), vocab_size)
    rows = [
        ScheduledSequence(number, len(new.token_ids), 0, (1,), True, new) for number, new in enumerate(news)
    ]
    plan = table.plan(SchedulerOutput(0, tuple(rows)))
    assert plan is not None
    return plan, table


def adjusted(logits: list[float], new: NewSequence) -> list[float]:
    """Masks, bias and penalties."""
    params, result = new.request.sampling_params, list(logits)
    prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
    for token in range(len(result)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = -math.inf
        for word in new.request.bad_words_token_ids:
            before = word[:-1]
            if (
                word[-1] == token
                and output[len(output) - len(before) :] == before
                and len(before) <= len(output)
            ):
                result[token] = -math.inf
        if len(output) < params.min_tokens and token in new.request.stop_token_ids:
            result[token] = -math.inf
        result[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in output:
            if result[token] > 0:
                result[token] /= params.repetition_penalty
            else:
                result[token] *= params.repetition_penalty
        result[token] -= params.frequency_penalty * output.count(token)
        result[token] -= params.presence_penalty * (token in output)
    return result


def filtered(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min_p, top_k (ties at the last one stay) and top_p (ties go by token id)."""
    result = [logit / params.temperature for logit in logits]
    most = max(result)
    result = [x if math.exp(x - most) >= params.min_p else -math.inf for x in result]
    if 0 < params.top_k < len(result):
        least = sorted(result, reverse=True)[params.top_k - 1]
        result = [x if x >= least else -math.inf for x in result]
    if params.top_p < 1:
        total = sum(math.exp(x - most) for x in result)
        kept, mass = set(), 0.0
        for token in sorted(range(len(result)), key=lambda t: (-result[t], t)):
            if mass >= params.top_p:
                break
            kept.add(token)
            mass += math.exp(result[token] - most) / total
        result = [x if token in kept else -math.inf for token, x in enumerate(result)]
    return result
