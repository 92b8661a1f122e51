"""The main job on the embedded proxy parents: compress, fuse, heal, evaluate, export, reload.

Command: make quickstart (or `delve upcycle`, which this calls; flags are passed on).
Expected: the table, times and numbers at the top of README.md. Reads no network and no ../shared:
its text is the running Python's own standard library, split by document hash.
"""

import sys
import time

from delve_jax import cli

if __name__ == "__main__":
    flags = sys.argv[1:]
    if "--out" not in flags:
        flags += ["--out", "out/quickstart"]
    began = time.time()
    code = cli.main(["upcycle", *flags])
    print(f"[quickstart] {time.time() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
