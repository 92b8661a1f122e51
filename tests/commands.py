"""`delve VERB` as tests call it: exit code, JSON and error line of a call in this process."""

import json

from delve_jax import cli


def delve(capsys, *argv):
    """(exit code, parsed stdout or None, stderr) of a verb with --json."""
    capsys.readouterr()
    try:
        code = cli.main([*map(str, argv), "--json"])
    except SystemExit as err:  # argparse
        code = err.code
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def bad(capsys, *argv) -> str:
    """The one line of a refused call."""
    code, out, err = delve(capsys, *argv)
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error:")]
    assert code == 2 and out is None and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
