"""Writes the README's table of kernels and targets from the baselines of their machine code.

python scripts/kernel_table.py            # writes it
python scripts/kernel_table.py --check    # 1 if the README has another
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from readme_table import write_or_check

from halimede.kernels.spec import all_kernels
from halimede.kernels.target import TARGETS

ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "tests/kernels/baselines"


def table() -> str:
    """Rows are kernels, columns targets; an entry is the most registers of a thread, of all builds.

    A build that spills is marked, a kernel without a build on a target has a dash.
    """
    registers: defaultdict[tuple[str, str], int] = defaultdict(int)
    spilling = set()
    for path in sorted(BASELINES.glob("*.json")):
        for name, (_digest, used, spilled, *_rest) in json.loads(path.read_text())["builds"].items():
            kernel, _signature, target, _function = name.split("|")
            registers[kernel, target] = max(registers[kernel, target], used)
            if spilled:
                spilling.add((kernel, target))
    lines = ["| | " + " | ".join(TARGETS) + " |", "| --- |" + " --- |" * len(TARGETS)]
    for kernel in all_kernels():
        entries = [
            f"{registers.get((kernel, target), '-')}{' (spills)' if (kernel, target) in spilling else ''}"
            for target in TARGETS
        ]
        lines.append(f"| `{kernel}` | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check("kernels", Path(__file__).name, table()))
