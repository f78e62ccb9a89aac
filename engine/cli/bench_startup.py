"""`halimede bench startup`: how long a fresh process takes to its first token, stage by stage.

`python -m halimede.engine.cli.bench_startup` is that process: it reads one JSON object from standard input
and prints one. Nothing heavy is imported here, because importing is what it times.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from halimede.errors import EngineDeadError

STAGES = ("process", "imports", "config", "tokenizer", "weights", "kv_cache", "first_token")
"""What comes after what; "process" is the start of Python up to this module."""


def measure_startup(
    model: str, engine: Mapping[str, Any], input_len: int, *, tokenizer: bool
) -> dict[str, float]:
    """Seconds of each of STAGES in a process of its own, and their "total".

    Raises EngineDeadError, with what the process wrote to standard error, when it fails.
    """
    job = {"model": model, "engine": engine, "input_len": input_len, "tokenizer": tokenizer}
    command = [sys.executable, "-m", "halimede.engine.cli.bench_startup"]
    start = time.monotonic()  # one clock for all processes of a machine
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineDeadError(f"the process that starts the engine failed: {reason[0]}")
    times = json.loads(done.stdout.splitlines()[-1])
    seconds, before = {}, start
    for stage in STAGES:
        seconds[stage] = times[stage] - before
        before = times[stage]
    return {**seconds, "total": before - start}


class _StageLog(logging.Handler):
    """Notes when the executor says that the weights are loaded."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.loaded: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("loaded "):
            self.loaded = time.monotonic()


def _run(job: Mapping[str, Any]) -> dict[str, float]:
    """Times of the monotonic clock at the end of each stage."""
    times = {"process": time.monotonic()}

    import torch  # noqa: F401
    import transformers  # noqa: F401

    from halimede.engine.build import build_core, open_model
    from halimede.engine.config import EngineConfig
    from halimede.engine.tokenizer import load_tokenizer
    from halimede.scheduler.request import Request
    from halimede.scheduler.sampling_params import SamplingParams

    times["imports"] = time.monotonic()
    config = EngineConfig(model=job["model"], **job["engine"])
    files, model_config = open_model(config)
    times["config"] = time.monotonic()
    if job["tokenizer"]:
        load_tokenizer(config, files)
    times["tokenizer"] = time.monotonic()
    stages, logger = _StageLog(), logging.getLogger("halimede.engine.executor")
    logger.addHandler(stages)
    logger.setLevel(logging.INFO)
    core, _ = build_core(config, files, model_config)
    times["kv_cache"] = time.monotonic()
    assert stages.loaded is not None, "the executor did not say when the weights were loaded"
    times["weights"] = stages.loaded
    prompt = tuple(7 * i % model_config.vocab_size for i in range(job["input_len"]))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    core.add(Request("startup", prompt, params, seed=0, arrival_time=time.monotonic()))
    while core.has_unfinished:
        core.step()
    times["first_token"] = time.monotonic()
    core.shutdown()
    return times


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    found = _run(json.load(sys.stdin))
    answers.write(json.dumps(found) + "\n")
    answers.close()


if __name__ == "__main__":
    _main()
