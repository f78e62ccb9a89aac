"""Who runs next: the order of sequences and the queue of those that wait."""

import heapq

from halimede.scheduler.config import SchedulingPolicy
from halimede.scheduler.request import Request
from halimede.scheduler.sequence import SchedulingKey, Sequence


def scheduling_key(policy: SchedulingPolicy, request: Request, seq_id: int) -> SchedulingKey:
    """The place of a request among the others, smallest first.

    "fcfs" is the order in which they were added; "priority" is priority, then arrival_time. Its first part
    is the rank: a waiting sequence may push out a running one only when its rank is smaller, and the victim
    of a preemption is always the running sequence with the greatest key.
    """
    if policy == "priority":
        return request.priority, request.arrival_time, seq_id
    return 0, 0.0, seq_id


class WaitingQueue:
    """Sequences that wait, smallest key first. A preempted one is before whatever came after it."""

    __slots__ = ("_discarded", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[SchedulingKey, Sequence]] = []
        self._discarded: set[int] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._discarded)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        heapq.heappush(self._heap, (sequence.key, sequence))

    def peek(self) -> Sequence | None:
        """The next sequence, None when nobody waits."""
        heap, discarded = self._heap, self._discarded
        while heap and heap[0][1].seq_id in discarded:
            discarded.remove(heapq.heappop(heap)[1].seq_id)
        return heap[0][1] if heap else None

    def pop(self) -> Sequence:
        """Remove and return the next sequence."""
        sequence = self.peek()
        assert sequence is not None, "pop from an empty waiting queue"
        heapq.heappop(self._heap)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence that will not come back. It leaves the heap when it surfaces.

        Those that might never surface are swept out once they outnumber the living.
        """
        self._discarded.add(sequence.seq_id)
        if 2 * len(self._discarded) > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].seq_id not in self._discarded]
            heapq.heapify(self._heap)
            self._discarded.clear()

    def sequences(self) -> list[Sequence]:
        """Everyone who waits, in no particular order."""
        return [sequence for _, sequence in self._heap if sequence.seq_id not in self._discarded]
