"""The seam between the engine's core and whatever runs a step. Imports no torch."""

from typing import TYPE_CHECKING, Protocol

from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput

if TYPE_CHECKING:  # Triton need not be installed
    from halimede.kernels.library import KernelCounters


class Executor(Protocol):
    """Runs scheduled steps, one after the other in the order in which they are launched.

    num_blocks: KV cache blocks, the null block included. max_model_len: tokens of the longest sequence.
    max_steps_in_flight: steps that may be launched before the first of them is collected; 1 where `launch`
    does all of the work.
    """

    @property
    def num_blocks(self) -> int:
        """As decided when the executor was made."""
        ...

    @property
    def max_model_len(self) -> int:
        """As decided when the executor was made."""
        ...

    @property
    def max_steps_in_flight(self) -> int:
        """As decided when the executor was made."""
        ...

    @property
    def kernel_counters(self) -> "KernelCounters | None":
        """What the kernel cache and the compiler had to do; None where no kernels are compiled."""
        ...

    def launch(self, output: SchedulerOutput) -> None:
        """Start one step; an output that only tells what to forget is a step too.

        A step whose launch raises is not in flight.
        """
        ...

    def collect(self) -> ModelRunnerOutput:
        """Wait for the oldest step in flight: what it produced. If it raises, `abandon` must follow."""
        ...

    def abandon(self) -> None:
        """Wait for all steps in flight, as well as that goes, and drop what they produced."""
        ...

    def start_profile(self, folder: str) -> None:
        """Record what runs from here on. ConfigError if that is being done already, or cannot be."""
        ...

    def stop_profile(self) -> str:
        """Write the record into the folder, as a trace for Perfetto or chrome://tracing; its path."""
        ...

    def shutdown(self) -> None:
        """Free everything. A second call does nothing."""
        ...
