"""The README's table of quantized checkpoints is that of the registry."""

import subprocess
import sys
from pathlib import Path


def test_the_readmes_table_is_up_to_date() -> None:
    script = Path(__file__).parents[2] / "scripts/quantization_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
