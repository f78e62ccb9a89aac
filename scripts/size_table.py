"""Prints lines per folder and the largest files and functions; fails when one is over its cap.

Caps (CONTRIBUTING.md): a file 400 lines, a function 50, a Triton kernel 150. Tests are counted, not capped.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CAPPED = ("engine", "kernels", "scheduler", "src", "scripts", "benchmarks", "examples")
FOLDERS = (*CAPPED, "tests")
FILE_CAP, FUNCTION_CAP, KERNEL_CAP = 400, 50, 150
SHOWN = 8


def python_files(folder: str) -> list[Path]:
    """The folder's own files; the package's symlinks to the other folders are not followed."""
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if p.resolve() == p]


def functions(path: Path) -> list[tuple[int, str, int]]:
    """(lines, name, cap) of each function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            found.append((lines, name, KERNEL_CAP if kernel else FUNCTION_CAP))
    return found


def main() -> int:
    """Print the table; 1 when a cap is broken."""
    broken: list[str] = []
    print(f"{'folder':<12}{'files':>6}{'lines':>8}{'largest':>9}")
    sizes: list[tuple[int, str, int]] = []
    for folder in FOLDERS:
        lengths = {p: len(p.read_text().splitlines()) for p in python_files(folder)}
        print(f"{folder:<12}{len(lengths):>6}{sum(lengths.values()):>8}{max(lengths.values(), default=0):>9}")
        if folder in CAPPED:
            for path, lines in lengths.items():
                if lines > FILE_CAP:
                    broken.append(f"{path.relative_to(ROOT)}: {lines} lines > {FILE_CAP}")
            sizes += [size for p in lengths for size in functions(p)]
    print("\nlongest functions")
    for lines, name, _ in sorted(sizes, reverse=True)[:SHOWN]:
        print(f"{lines:>5}  {name}")
    broken += [f"{name}: {lines} lines > {cap}" for lines, name, cap in sizes if lines > cap]
    for line in broken:
        print(f"over the cap: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
