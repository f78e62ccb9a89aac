"""Runs every stage in a process of its own, with a time limit, then the report. See scripts/gpu_check.sh.

    python benchmarks/gpu/run_stages.py OUTDIR [--cpu-rehearsal] [--only STAGE,STAGE] [--minutes N]

Exit status 1 if anything failed, 2 without a GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from rehearsal import REHEARSAL

HERE = Path(__file__).parent
MINUTES = 7.75
NO_GPU = 2
# Of a process that was stopped, as timeout(1) has it.
TIMED_OUT = 124


@dataclass(frozen=True)
class Stage:
    """name: of its results. limit_s: the most it may take; least_s: what earlier stages must leave it."""

    name: str
    script: str
    limit_s: float
    least_s: float
    arguments: tuple[str, ...] = ()
    rehearsal_arguments: tuple[str, ...] = ()


STAGES = (
    Stage("parity", "parity", 90, 30, rehearsal_arguments=("--only", "copy_blocks,embed")),
    Stage("families", "families", 90, 30),
    Stage("kernel_cache", "kernel_cache", 80, 30),
    Stage("ceilings", "ceilings", 40, 20),
    Stage("kernels", "kernel_timings", 100, 30),
    Stage("quantized_products", "quantized_products", 100, 30),
    Stage("serving", "serving", 100, 50),
    Stage("serving_quantized", "serving_quantized", 90, 30),
    Stage("serving_eager", "serving", 50, 30, ("--enforce-eager",)),
    Stage("transformers_generate", "transformers_generate", 60, 20),
    # Last, for it takes what time is left.
    Stage("throughput", "throughput", 200, 50),
    Stage("report", "gpu_report", 20, 15),
)
_LOADING_S = 35.0  # of throughput, before and after what it measures


@dataclass(frozen=True)
class Outcome:
    """Of a stage. status: of its process, TIMED_OUT if it was stopped."""

    name: str
    status: int
    seconds: float
    limit_s: float


def limit_of(
    index: int, elapsed_s: float, stages: Sequence[Stage] = STAGES, total_s: float = 60 * MINUTES
) -> float:
    """Seconds for a stage: its limit, less if the others would not have their least then. total_s: of all."""
    later = sum(stage.least_s for stage in stages[index + 1 :])
    return max(5.0, min(stages[index].limit_s, total_s - elapsed_s - later))


def command_of(stage: Stage, out: Path, limit_s: float, *, rehearsal: bool) -> list[str]:
    output = out / f"{stage.name}.json"
    command = [sys.executable, str(HERE / f"{stage.script}.py"), "--output", str(output), *stage.arguments]
    if stage.name == "throughput":
        command += ["--budget", f"{max(10.0, min(150.0, limit_s - _LOADING_S)):.0f}"]
    if rehearsal:
        command += ["--device", "cpu", *stage.rehearsal_arguments]
    return command


def run_process(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    environment: Mapping[str, str],
    *,
    kill_after_s: float = 5.0,
) -> int:
    """Run it and whatever it starts, at most so long; its words go to the screen and to `log`.

    kill_after_s: from asking it to end to killing it.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(environment),
            start_new_session=True,
        )
        assert process.stdout is not None

        def copy(lines: IO[str]) -> None:
            with lines:
                for line in lines:
                    print(line, end="", flush=True)
                    file.write(line)
                    file.flush()

        reader = threading.Thread(target=copy, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
            _end(process, kill_after_s)
        except BaseException:  # Ctrl-C: the stage has a session of its own and does not get it
            _end(process, kill_after_s)
            raise
        reader.join(kill_after_s)
        if status == TIMED_OUT:
            print(f"stopped after {limit_s:.0f} s", file=file)
    return status


def _end(process: subprocess.Popen[str], kill_after_s: float) -> None:
    """The whole group: a stage starts processes too, and one that hangs on a GPU ignores SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(kill_after_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def facts() -> dict[str, Any]:
    """What the stages cannot know of the tree and the driver."""
    # Of a copy that belongs to somebody else, too.
    found: dict[str, Any] = {"commit": _words("git", "-c", "safe.directory=*", "rev-parse", "HEAD")}
    found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    found["nvidia_smi"] = _words("nvidia-smi", query, "--format=csv,noheader")
    return found


def _words(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment_for(scratch: Path, *, rehearsal: bool) -> dict[str, str]:
    """Kernels that a stage compiles serve the later ones too, and nothing is taken from earlier runs."""
    environment = {
        **os.environ,
        "HALIMEDE_KERNEL_CACHE": str(scratch / "kernels"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if rehearsal:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return environment


def run_all(out: Path, names: Sequence[str], minutes: float, *, rehearsal: bool) -> int:
    stages = [stage for stage in STAGES if stage.name in (*names, "report")] if names else list(STAGES)
    record: dict[str, Any] = {**({"rehearsal": REHEARSAL} if rehearsal else {}), **facts(), "stages": []}
    start, worst = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = environment_for(Path(scratch), rehearsal=rehearsal)
        for index, stage in enumerate(stages):
            begin = time.monotonic()
            limit_s = limit_of(index, begin - start, stages, 60 * minutes)
            print(f"== {stage.name} (at most {limit_s:.0f} s)", flush=True)
            (out / f"{stage.name}.json").unlink(missing_ok=True)  # of an earlier run
            command = command_of(stage, out, limit_s, rehearsal=rehearsal)
            status = run_process(command, out / f"{stage.name}.txt", limit_s, environment)
            worst = max(worst, int(status != 0))
            record["stages"].append(asdict(Outcome(stage.name, status, time.monotonic() - begin, limit_s)))
            (out / "stages.json").write_text(json.dumps(record, indent=1))
    return worst


def has_gpu() -> bool:
    """Asked in another process: one that has used a GPU keeps memory there."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="tiny shapes on the CPU; no figure counts"
    )
    parser.add_argument("--only", default="", help=f"some of: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for all stages together ({MINUTES:g})"
    )
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}")
    if not options.cpu_rehearsal and not has_gpu():
        print(
            "torch sees no GPU; --cpu-rehearsal runs everything on tiny shapes without one", file=sys.stderr
        )
        return NO_GPU
    options.out.mkdir(parents=True, exist_ok=True)
    return run_all(options.out.resolve(), names, options.minutes, rehearsal=options.cpu_rehearsal)


if __name__ == "__main__":
    raise SystemExit(main())
