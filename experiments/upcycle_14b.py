"""Are mamba-1.4b, rwkv-4-1b5, pythia-1.4b and pythia-1b at half their parameters one better model?

Flags are those of `delve upcycle` (its --parents, --keep 0.5, --heal-tokens, --batch and --lr 1e-4
are set here); --dry-run prints the plan without weights. One H200:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python experiments/upcycle_14b.py --data train.txt \\
        --calibrate calibrate.txt --report-text held_back.txt --out out/delve-1.4b

TPU v5e, a slice of 16 chips on 4 hosts with a shared folder (fusion needs more than one chip has;
the second line on every host, the others on the CPU of one):

    JAX_PLATFORMS=cpu python experiments/upcycle_14b.py --heal-tokens 0 \\
        --calibrate calibrate.txt --report-text held_back.txt --out shared/delve-1.4b
    delve heal shared/delve-1.4b/fused shared/healed --data train.txt --tokens 400000000 \\
        --batch 32 --lr 1e-4 --mesh data=16
    JAX_PLATFORMS=cpu delve export shared/healed shared/hf
    JAX_PLATFORMS=cpu delve eval shared/healed --text held_back.txt

Planned bytes of a device, and healing's time and cost (results/tiers.json):

    fusion: 11.1 GiB a device
    1 x h200, data=1, batch 16: 76.8 GiB of 131.3 GiB; 400 M tokens in 18.3 h, $64
    16 x v5e, data=16, batch 32: 11.0 GiB of 14.9 GiB; 400 M tokens in 5.7 h, $110
    decode data=1: 7.5 GiB a device (15.1 GiB if XLA first converts all weights)

Assumed: 15% of the bfloat16 peak, $3.50 an H200 and hour, $1.20 a v5e chip and hour; compression
and scores come on top. Expected nats: not yet run (neither hub nor accelerator was at hand). No
commit of the parents is pinned for the same reason: `--parents id@revision ...` does it.
"""

import sys

import tiers


def main(argv: list[str]) -> int:
    """The exit code of `delve upcycle`, or of a dry run."""
    return tiers.main_of("delve-1.4b", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
