"""The seam between the engine's core and whatever runs a step. Imports no torch."""

from typing import TYPE_CHECKING, Protocol

from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput

if TYPE_CHECKING:  # Triton need not be installed
    from halimede.kernels.library import KernelCounters


class Executor(Protocol):
    """Runs scheduled steps.

    num_blocks: KV cache blocks, the null block included. max_model_len: tokens of the longest sequence.
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
    def kernel_counters(self) -> "KernelCounters | None":
        """What the kernel cache and the compiler had to do; None where no kernels are compiled."""
        ...

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step; an output that only tells what to forget is a step too."""
        ...

    def shutdown(self) -> None:
        """Free everything. A second call does nothing."""
        ...
