"""Every case of every kernel on this machine's GPU against its reference: prints what differs.

PYTHONPATH=src:tests:tests/kernels python benchmarks/gpu/parity.py --output parity.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kernel_parity import check_case
from timing import describe

from halimede.kernels.spec import all_kernels


def run(device: str, only: str) -> list[dict[str, Any]]:
    results = []
    for spec in all_kernels().values():
        if only not in spec.name:
            continue
        for case in spec.cases:
            start, error = time.perf_counter(), None
            try:
                check_case(spec, case, device=device)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"[:2000]
            seconds = round(time.perf_counter() - start, 3)
            results.append({"kernel": spec.name, "case": case.name, "seconds": seconds, "error": error})
            if error:
                print(f"FAILED {spec.name} ({case.name}): {error.splitlines()[0]}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    options = parser.parse_args()
    import torch

    results = run(options.device, options.only)
    failed = sum(result["error"] is not None for result in results)
    report = {"machine": describe(torch.device(options.device)), "results": results}
    options.output.write_text(json.dumps(report, indent=1))
    print(f"parity: {len(results) - failed} of {len(results)} cases equal their reference")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
