"""Are mamba-370m, rwkv-4-430m and pythia-410m at half their parameters one better model?

Flags are those of `delve upcycle` (its --parents, --keep 0.5, --heal-tokens, --batch and --lr 1e-4
are set here); --dry-run prints the plan without weights. One H200:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python experiments/upcycle_04b.py --data train.txt \\
        --calibrate calibrate.txt --report-text held_back.txt --out out/delve-0.4b

TPU v5e, a slice of 8 chips on one host:

    python experiments/upcycle_04b.py --device v5e --mesh data=8 --data train.txt \\
        --calibrate calibrate.txt --report-text held_back.txt --out out/delve-0.4b

Planned bytes of a device, and healing's time and cost (results/tiers.json):

    fusion: 3.8 GiB a device
    1 x h200, data=1, batch 32: 27.5 GiB of 131.3 GiB; 200 M tokens in 2.1 h, $7
    8 x v5e, data=8, batch 32: 5.3 GiB of 14.9 GiB; 200 M tokens in 1.3 h, $13
    decode data=1: 1.8 GiB a device (3.6 GiB if XLA first converts all weights)

Assumed: 15% of the bfloat16 peak, $3.50 an H200 and hour, $1.20 a v5e chip and hour; compression
and scores come on top. Expected nats: not yet run (neither hub nor accelerator was at hand). No
commit of the parents is pinned for the same reason: `--parents id@revision ...` does it.
"""

import sys

import tiers


def main(argv: list[str]) -> int:
    """The exit code of `delve upcycle`, or of a dry run."""
    return tiers.main_of("delve-0.4b", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
