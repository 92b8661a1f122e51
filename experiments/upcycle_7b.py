"""Are mamba-7b-rw, rwkv-4-7b and RedPajama-INCITE-7B at half their parameters one better model?

Flags are those of `delve upcycle` (its --parents, --keep 0.5, --heal-tokens, --batch and --lr 1e-4
are set here); --dry-run prints the plan without weights. Four H200 of one host:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python experiments/upcycle_7b.py --mesh data=4 \\
        --data train.txt --calibrate calibrate.txt --report-text held_back.txt --out out/delve-7b

One H200 cannot hold the state and three teachers. It compresses, fuses and scores at any ratio, and
heals a quarter of the parameters by cross-entropy alone:

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    python experiments/upcycle_7b.py --keep 0.25 --heal-tokens 0 \\
        --calibrate calibrate.txt --report-text held_back.txt --out out/delve-7b
    delve heal out/delve-7b/fused out/healed --objective ce --data train.txt --tokens 1000000000 \\
        --batch 8 --lr 1e-4
    delve export out/healed out/hf

TPU v5e, a slice of 64 chips on 16 hosts with a shared folder (the second line on every host, the
others on the CPU of one):

    JAX_PLATFORMS=cpu python experiments/upcycle_7b.py --heal-tokens 0 \\
        --calibrate calibrate.txt --report-text held_back.txt --out shared/delve-7b
    delve heal shared/delve-7b/fused shared/healed --data train.txt --tokens 1000000000 \\
        --batch 32 --lr 1e-4 --mesh data=32,model=2
    JAX_PLATFORMS=cpu delve export shared/healed shared/hf
    JAX_PLATFORMS=cpu delve eval shared/healed --text held_back.txt

Planned bytes of a device, and healing's time and cost (results/tiers.json):

    fusion: 40.8 GiB a device
    4 x h200, data=4, batch 32: 87.8 GiB of 131.3 GiB; 1,000 M tokens in 48.1 h, $673
    1 x h200, data=1, batch 32: 321.6 GiB of 131.3 GiB; does not fit
    1 x h200, data=1, batch 8, keep 0.25, ce: 105.7 GiB of 131.3 GiB; 1,000 M tokens in 54.7 h, $191
    64 x v5e, data=32,model=2, batch 32: 12.6 GiB of 14.9 GiB; 1,000 M tokens in 15.1 h, $1,158
    decode data=1: 26.3 GiB a device (63.3 GiB if XLA first converts all weights)
    decode data=2,model=4: 8.2 GiB a device (16.4 GiB if XLA first converts all weights)

Assumed: 15% of the bfloat16 peak, $3.50 an H200 and hour, $1.20 a v5e chip and hour; compression
and scores come on top. Expected nats: not yet run (neither hub nor accelerator was at hand). No
commit of the parents is pinned for the same reason: `--parents id@revision ...` does it.
"""

import sys

import tiers


def main(argv: list[str]) -> int:
    """The exit code of `delve upcycle`, or of a dry run."""
    return tiers.main_of("delve-7b", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
