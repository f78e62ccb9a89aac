"""A table in the README that a script makes, between two markers of its own."""

import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def write_or_check(name: str, script: str, table: str) -> int:
    """Put the table between the markers of `name`, or with --check compare; the exit status.

    script: the one that calls this, which the first marker and the complaint name.
    """
    begin, end = f"<!-- {name}: made by scripts/{script} -->\n", f"<!-- /{name} -->"
    text = README.read_text()
    before, rest = text.split(begin)
    _old, after = rest.split(end)
    new = f"{before}{begin}\n{table}\n{end}{after}"
    if sys.argv[1:] == ["--check"]:
        if new != text:
            print(f"the README's table of {name} is not up to date; run python scripts/{script}")
        return int(new != text)
    README.write_text(new)
    return 0
