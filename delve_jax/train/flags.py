"""The flags of `heal`, `train` and `plan`: parsing, and what of `Settings` and `Terms` they give.

Imports no JAX before a run is asked for: `delve --help` must not wait for it.
"""

from __future__ import annotations

import argparse

EVERY, SEED = "steps between saved states (200)", "of all draws (0)"
# what --stages says in the place of flags, by the names that these have when they are parsed
OBJECTIVE = {"objective", "kl_weight", "stream_kl", "hidden_match", "stream_drop", "rank_drop",
             "ffn_share", "trains", "joints_lr"}  # fmt: skip


def seed(text: str) -> int:
    """A seed that every generator here takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: a seed is a whole number from 0 to 2^32 - 1")
    return int(text)


def objective(p: argparse.ArgumentParser) -> None:
    """What healing is for: OBJECTIVE. A flag that is not given is no attribute of what is parsed,
    so that --stages can refuse those that are; `terms` and `Settings` have the defaults."""
    usual = p.argument_default
    p.argument_default = argparse.SUPPRESS
    p.add_argument("--objective", choices=("ce", "ce+kl"),
                   help="ce: of the text alone, without teachers")  # fmt: skip
    p.add_argument("--kl-weight", metavar="W[:W2]",
                   help="KL to the parents' pool; the rest is cross-entropy; W:W2 from first to "
                   "last step")  # fmt: skip
    p.add_argument("--stream-kl", metavar="W[:W2]",
                   help="of a DELVE: KL of each stream to its own parent")  # fmt: skip
    p.add_argument("--hidden-match", metavar="W[:W2]",
                   help="of a DELVE: streams to their parents' between superblocks")  # fmt: skip
    p.add_argument("--stream-drop", type=float, metavar="P",
                   help="chance that a sequence does without a stream")  # fmt: skip
    p.add_argument("--rank-drop", type=float, metavar="SHARE",
                   help="train for --keep at loading: least share of all factors")  # fmt: skip
    p.add_argument("--ffn-share", type=float, metavar="SHARE",
                   help="of a DELVE with routers: tokens that run their FFNs")  # fmt: skip
    p.add_argument("--train", choices=("all", "experts", "joints"), dest="trains",
                   help="of a DELVE: joints are hub, gate and pool")  # fmt: skip
    p.add_argument("--joints-lr", type=float, metavar="X", help="times the rate")
    p.argument_default = usual


def track(p: argparse.ArgumentParser) -> None:
    """Where the log goes beside metrics.jsonl."""
    p.add_argument("--track", nargs="+", default=[], choices=("tensorboard", "wandb"),
                   help="show the metrics there too; wandb obeys WANDB_MODE")  # fmt: skip


def run(p: argparse.ArgumentParser, plan: bool = False) -> None:
    """The flags of `Settings`, for heal, train and (in part required) plan."""
    if not plan:
        p.add_argument("--data", nargs="+", required=True, metavar="TEXT[=WEIGHT]",
                       help="text files or token folders")  # fmt: skip
        p.add_argument("--save-every", type=int, default=200, metavar="STEPS", help=EVERY)
        p.add_argument("--save-minutes", type=float, default=10.0, help="or after so long (10)")
        p.add_argument("--keep-every", type=int, metavar="STEPS",
                       help="states that stay for good; else the last two")  # fmt: skip
        p.add_argument("--distributed", metavar="HOST:PORT,N,I",
                       help="process I of N; default: found (TPU VM, Slurm, MPI)")  # fmt: skip
        track(p)
    p.add_argument("--tokens", type=int, required=not plan, metavar="N", help="to train on")
    p.add_argument("--batch", type=int, default=8, help="rows of a step, over all devices")
    p.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
    p.add_argument("--window", type=int, help="tokens per row; default: context, at most 512")
    p.add_argument("--optimizer", default="adamw", choices=("adamw", "adamh"),
                   help="adamh: Delphi's, matrices turn and keep their norm")  # fmt: skip
    p.add_argument("--lr", type=float, help="peak; default 1e-3 (adamw), 1e-2 (adamh)")
    p.add_argument("--adam-lr", type=float, help="adamh: of all but matrices; default lr / 10")
    p.add_argument("--weight-decay", type=float, default=0.01, help="adamw")
    p.add_argument("--schedule", default="wsd", choices=("wsd", "cosine", "linear"),
                   help="of the rate; wsd: warmup, stable, decay")  # fmt: skip
    p.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    p.add_argument("--decay", type=float, default=0.2, help="share of the steps (wsd)")
    for flag, what in (("--b2", "decay of the second moment"), ("--eps", "added to its root"),
                       ("--clip", "largest norm of the gradient")):  # fmt: skip
        p.add_argument(flag, type=float, metavar="X", help=f"{what}; default: the optimizer's")
    p.add_argument("--z-loss", type=float, default=0.0, metavar="W",
                   help="weight of the squared log-normaliser")  # fmt: skip
    p.add_argument("--compute", default="float32", choices=("float32", "bfloat16", "float64"),
                   help="dtype of activations and products; weights: float32")  # fmt: skip
    p.add_argument("--remat", default="auto", choices=("auto", "none", "layer", "dots"),
                   help="what the backward pass computes again")  # fmt: skip
    p.add_argument("--mesh", help='as "replica=2,data=4,model=2"; default: all devices on data')
    p.add_argument("--shard-sequence", action="store_true",
                   help="split T between layers over model=")  # fmt: skip
    p.add_argument("--across-documents", action="store_true",
                   help="let documents in a row see each other")  # fmt: skip
    p.add_argument("--seed", type=seed, default=0, help=SEED)


def settings(kw: dict):
    """Settings from the parsed flags, which are taken out of `kw`."""
    from dataclasses import fields

    from .loop import Saving
    from .run import Settings

    saving = Saving()
    if "save_every" in kw:
        saving = Saving(every=kw.pop("save_every"), minutes=kw.pop("save_minutes"),
                        keep_every=kw.pop("keep_every"), track=tuple(kw.pop("track")))  # fmt: skip
    names = {f.name for f in fields(Settings)} & set(kw)
    return Settings(**{n: kw.pop(n) for n in names}, saving=saving)


def terms(kw: dict):
    """The objective from the parsed flags, which are taken out of `kw`."""
    from ..config import DelveError
    from .objective import Terms, ends

    def weight(flag: str, usual: str):
        text = kw.pop(flag, usual)
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise DelveError(
                f"--{flag.replace('_', '-')} {text}: expected a number, or two as 1:0.5"
            )
        return numbers[0] if len(numbers) == 1 else tuple(numbers)

    kl, streams, hidden = map(weight, ("kl_weight", "stream_kl", "hidden_match"), ("0.5", "0", "0"))
    if not all(0 <= w <= 1 for w in ends(kl)):
        raise DelveError(f"--kl-weight {kl}: must lie in [0, 1]")
    drops = ("stream_drop", "rank_drop", "ffn_share")
    drops = {name: kw.pop(name) for name in drops if name in kw}
    if kw.pop("objective", "ce+kl") == "ce":
        unused = {"kl-weight": kl != 0.5, "stream-kl": streams != 0, "hidden-match": hidden != 0}
        for flag in (name for name, given in unused.items() if given):
            raise DelveError(f"--{flag}: not beside --objective ce, which asks no teacher")
        return Terms(ce=1.0, kl=0.0, **drops)
    ce = 1 - kl if isinstance(kl, float) else tuple(1 - w for w in kl)
    return Terms(ce=ce, kl=kl, streams=streams, hidden=hidden, **drops)
