"""The tables of README and docs/results.md are those of the committed result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_agree_with_results():
    script = ROOT / "experiments" / "tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
