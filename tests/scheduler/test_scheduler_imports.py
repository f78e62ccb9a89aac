import subprocess
import sys
from pathlib import Path

import halimede

SCHEDULER = Path(halimede.__file__).parent / "scheduler"


def test_the_scheduler_never_imports_torch() -> None:
    modules = sorted(f"halimede.scheduler.{path.stem}" for path in SCHEDULER.glob("[a-z]*.py"))
    assert "halimede.scheduler.scheduler" in modules
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
unwanted = {{"torch", "numpy", "transformers", "halimede.engine", "halimede.kernels"}} & sys.modules.keys()
assert not unwanted, unwanted
"""
    source = str(SCHEDULER.parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source})
