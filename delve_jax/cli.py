"""`delve VERB`: parsing and printing only; the work is in `road` and `upcycle`.

Exit 0: done. Exit 2: bad input, one line on stderr. With --json one JSON object stands on stdout;
bars and logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

EXAMPLES = {
    "upcycle": "delve upcycle --keep 0.5 --out out/quickstart",
    "convert": "delve convert EleutherAI/pythia-410m-deduped@main out/pythia",
    "compress": "delve compress out/pythia out/pythia-small --keep 0.5 --calibrate text.txt",
    "fuse": "delve fuse out/mamba-small out/pythia-small out/fused --calibrate text.txt",
    "heal": "delve heal out/fused out/healed --data text.txt --tokens 20000000",
    "eval": "delve eval out/healed --text held_back.txt --tasks piqa.jsonl",
    "export": "delve export out/healed out/hf",
    "generate": 'delve generate out/healed --prompt "The residual stream"',
    "info": "delve info out/healed",
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and exit code 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """All verbs and their flags."""
    top = Parser(prog="delve", description=__doc__.split("\n")[0])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def verb(name, text, writes=False):
        p = verbs.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if writes:
            p.add_argument("--overwrite", action="store_true", help="replace DST and work for it")
        return p

    p = verb("upcycle", "the whole road: compress, fuse, heal, evaluate, export", writes=True)
    p.add_argument(
        "--parents",
        nargs="+",
        default=[],
        metavar="SRC",
        help="directories, hub ids (id@revision), .pth; default: the embedded proxies",
    )
    p.add_argument("--keep", type=float, default=0.5, help="kept share of all parameters (0.5)")
    p.add_argument("--method", default="delve", help="delve (whitened) or svd")
    p.add_argument("--heal-tokens", type=int, help="training tokens (80000); 0: stop at fusion")
    p.add_argument("--data", nargs="+", default=[], metavar="TEXT", help="text to heal on")
    p.add_argument(
        "--calibrate", nargs="+", default=[], metavar="TEXT", help="text to compress and pool with"
    )
    p.add_argument(
        "--report-text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="held-back text for the reported numbers",
    )
    p.add_argument("--calibrate-tokens", type=int, default=65536)
    p.add_argument(
        "--report-bytes", type=int, default=120_000, help="about how much report text is scored"
    )
    p.add_argument(
        "--latents",
        type=int,
        default=1,
        choices=(0, 1),
        help="1: log-linear pool; 0: mixture, one latent per parent",
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of healing")
    p.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    p.add_argument("--mesh", help='devices, as "data=4,model=2"; default: all on data')
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="out/delve", metavar="DIR")

    p = verb("convert", "any source to a checkpoint directory", writes=True)
    p.add_argument("src"), p.add_argument("dst")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    p.add_argument("--mesh", help='shard over devices, as "data=8"')

    p = verb("compress", "factorise a parent to a share of all its parameters", writes=True)
    p.add_argument("src"), p.add_argument("dst")
    p.add_argument("--keep", type=float, required=True)
    p.add_argument("--method", default="delve", help="delve (whitened) or svd")
    p.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT")
    p.add_argument("--calibrate-tokens", type=int, default=65536)
    p.add_argument("--seed", type=int, default=0)

    p = verb("fuse", "pool compressed or dense parents into one DELVE", writes=True)
    p.add_argument("sources", nargs="+", metavar="SRC"), p.add_argument("dst")
    p.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="fit the pool weights on it; equal weights without",
    )
    p.add_argument("--calibrate-tokens", type=int, default=32768)
    p.add_argument(
        "--latents",
        type=int,
        default=1,
        choices=(0, 1),
        help="1: log-linear pool; 0: mixture, one latent per parent",
    )
    p.add_argument("--hub-rank", type=int)
    p.add_argument("--seed", type=int, default=0)

    p = verb("heal", "train towards the dense parents' pool", writes=True)
    p.add_argument("src"), p.add_argument("dst")
    p.add_argument("--data", nargs="+", required=True, metavar="TEXT")
    p.add_argument("--tokens", type=int, required=True)
    p.add_argument("--teachers", nargs="+", metavar="SRC", help="default: those in the config")
    p.add_argument("--objective", default="ce+kl", choices=("ce", "ce+kl"))
    p.add_argument("--kl-weight", type=float, default=0.5)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--window", type=int, help="tokens per row; default: context, at most 512")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    p.add_argument("--mesh", help='as "data=4,model=2"; default: all devices on data')
    p.add_argument("--seed", type=int, default=0)

    p = verb("eval", "nll, bits per byte and task metrics")
    p.add_argument("src")
    p.add_argument("--text", nargs="+", default=[], metavar="FILE")
    p.add_argument("--tasks", nargs="+", default=[], metavar="FILE.jsonl")
    p.add_argument("--backend", default="jax", choices=("jax", "hf"))
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="hf backend: run code that comes with the model",
    )

    p = verb("export", "checkpoint to a Hugging Face directory", writes=True)
    p.add_argument("src"), p.add_argument("dst")
    p.add_argument(
        "--layout",
        choices=("dense", "factored"),
        help="default: factored for a DELVE, dense (stock classes) for a parent",
    )

    p = verb("generate", "continue a text")
    p.add_argument("src")
    p.add_argument("--prompt", required=True)
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0)

    p = verb("info", "what a source is: family, parameters, ranks, pool weights")
    p.add_argument("src")
    return top  # fmt: skip


def run(args: argparse.Namespace) -> dict:
    """Call the verb with its flags."""
    kw = {k: v for k, v in vars(args).items() if k not in ("verb", "json", "src", "dst")}
    from . import road

    if args.verb == "upcycle":
        from .upcycle import upcycle

        kw["text"] = kw.pop("data")
        return upcycle(kw.pop("parents"), kw.pop("out"), **kw)
    if args.verb == "fuse":
        return road.fuse(kw.pop("sources"), args.dst, **kw)
    if args.verb == "heal":
        kw["text"] = kw.pop("data")
        return road.heal(args.src, args.dst, **kw)
    if args.verb in ("convert", "compress", "export"):
        return getattr(road, args.verb)(args.src, args.dst, **kw)
    if args.verb == "eval":
        return road.evaluate(args.src, **kw)
    if args.verb == "generate":
        return road.generate(args.src, **kw)
    return road.info(args.src)


def show(verb: str, result: dict) -> str:
    """A result for people."""
    if verb == "upcycle":
        from .report import table

        check = "verified" if result["export"]["verified"] else "NOT verified (torch is missing)"
        return (
            f"{table(result)}\n\nkept {result['keep']:.4f} of the parents' parameters; "
            f"export {check}; pool weights "
            + ", ".join(f"{n} {w:.3f}" for n, w in result["pool"].items())
            + f"\n\nsample: {result['sample']!r}"
        )
    if verb == "generate":
        return result["prompt"] + result["text"]
    return "\n".join(
        f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}"
        for key, value in result.items()
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    from .config import DelveError

    _compile_cache()
    try:
        result = run(args)
    except DelveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    if result.get("already"):
        print("already done; nothing to do", file=sys.stderr)
    print(json.dumps(result) if args.json else show(args.verb, result))
    return 0


def _compile_cache() -> None:
    """Compiled programs are kept in the user's cache folder, so a second run starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "delve_jax" / "jax")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    raise SystemExit(main())
