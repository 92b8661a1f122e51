"""`delve VERB`: parsing; the work is in `road`, `training`, `look`, `plan`, `upcycle`, `delphi`.

Exit 0: done. Exit 2: bad input, one line on stderr. With --json one JSON object stands on stdout;
bars and logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .train import flags

EXAMPLES = {
    "upcycle": "delve upcycle --keep 0.5 --out out/quickstart",
    "convert": "delve convert EleutherAI/pythia-410m-deduped@main out/pythia",
    "compress": "delve compress out/pythia out/pythia-small --keep 0.5 --calibrate text.txt",
    "fuse": "delve fuse out/mamba-small out/pythia-small out/fused --calibrate text.txt",
    "heal": "delve heal out/fused out/healed --data text.txt --tokens 20000000",
    "train": "delve train pythia-31m out/run --data out/tokens --tokens 500000000",
    "plan": "delve plan delve-1.4b --mesh data=8 --compute bfloat16",
    "data": "delve data prepare text.jsonl.zst out/tokens --tokenizer out/pythia",
    "list": "delve data list --json",
    "eval": "delve eval out/healed --text held_back.txt --tasks piqa.jsonl",
    "export": "delve export out/healed out/hf",
    "generate": 'delve generate out/healed --prompt "The residual stream"',
    "info": "delve info out/healed",
    "inspect": "delve inspect out/healed --text held_back.txt --out out/look",
    "candidates": "delve delphi candidates --flops 3e20",
    "recipe": "delve delphi recipe --flops 1e21 --batch 512",
    "fit": "delve delphi fit points.csv",
    "forecast": "delve delphi forecast points.csv --flops 1e21 1e22 1e23",
    "sweep": "delve delphi sweep out/ladder --flops 3e18 9e18 --data out/tokens "
    "--report-text held_back.txt",
    "downstream": "delve delphi downstream winners.csv --pool models.csv --flops 1e22 --floor 0.25",
}

# settings that a sweep's runs can be given in the place of the recipe's
GIVEN = {"optimizer": str, "lr": float, "adam_lr": float, "weight_decay": float, "batch": int,
         "window": int, "schedule": str, "compute": str, "remat": str}  # fmt: skip
# verbs that write and know nothing of other processes
ONE_PROCESS = {"upcycle", "convert", "compress", "fuse", "export", "data prepare", "delphi sweep"}
METHOD_HELP = "delve, svd-llm+allocation, svd-llm, asvd or svd"
SRC = "Hugging Face directory, hub id (id@revision), RWKV .pth or checkpoint"
DST = "directory to make; DST.partial until it is whole"
OF_TEXT = "tokens of --calibrate"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and exit code 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """All verbs and their flags."""
    top = Parser(prog="delve", description=__doc__.split("\n")[0],
                 epilog=f"example: {EXAMPLES['upcycle']}")  # fmt: skip
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def verb(name, text, writes=False):
        p = verbs.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if writes:
            p.add_argument("--overwrite", action="store_true", help="replace DST and work for it")
        return p

    p = verb("upcycle", "the whole road: compress, fuse, heal, evaluate, export", writes=True)
    p.add_argument("--parents", nargs="+", default=[], metavar="SRC",
                   help="directories, hub ids (id@revision), .pth; default: embedded")  # fmt: skip
    p.add_argument("--keep", type=float, default=0.5, help="kept share of all parameters (0.5)")
    p.add_argument("--method", default="delve", help=METHOD_HELP)
    p.add_argument("--heal-tokens", type=int, help="training tokens (80000); 0: stop at fusion")
    p.add_argument("--data", nargs="+", default=[], metavar="TEXT", help="text to heal on")
    p.add_argument(
        "--calibrate", nargs="+", default=[], metavar="TEXT", help="text to compress and pool with"
    )
    p.add_argument("--report-text", nargs="+", default=[], metavar="TEXT",
                   help="held-back text for the reported numbers")  # fmt: skip
    p.add_argument("--calibrate-tokens", type=int, default=65536, help=OF_TEXT)
    p.add_argument("--report-bytes", type=int, default=120_000,
                   help="about how much report text is scored")  # fmt: skip
    p.add_argument("--latents", type=int, default=1, choices=(0, 1),
                   help="1: log-linear pool; 0: mixture, one latent per parent")  # fmt: skip
    p.add_argument("--batch", type=int, default=8, help="rows of a step of healing (8)")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of healing")
    p.add_argument("--save-every", type=int, default=200, metavar="STEPS", help=flags.EVERY)
    p.add_argument("--mesh", help='devices, as "data=4,model=2"; default: all on data')
    p.add_argument("--seed", type=flags.seed, default=0, help=flags.SEED)
    p.add_argument("--out", default="out/delve", metavar="DIR", help="for all results (out/delve)")

    p = verb("convert", "any source to a checkpoint directory", writes=True)
    p.add_argument("src", help=SRC), p.add_argument("dst", help=DST)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    p.add_argument("--storage", help="form of the factors: uv, pivot or int8; default: as stored")
    p.add_argument("--mesh", help='shard over devices, as "data=8"')
    _part_flags(p)

    p = verb("compress", "factorise a parent to a share of all its parameters", writes=True)
    p.add_argument("src", help=SRC), p.add_argument("dst", help=DST)
    p.add_argument("--keep", type=float, required=True, help="kept share of all parameters")
    p.add_argument("--method", default="delve", help=METHOD_HELP)
    p.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT",
                   help="text to compress with; svd alone needs none")  # fmt: skip
    p.add_argument("--calibrate-tokens", type=int, default=65536, help=OF_TEXT)
    p.add_argument("--refine-tokens", type=int, default=0, metavar="N",
                   help="then train it on N distinct tokens of that text")  # fmt: skip
    p.add_argument("--refine-written", type=int, default=4, metavar="X",
                   help="and on X N tokens that the parent writes itself (4)")  # fmt: skip
    p.add_argument("--storage", default="uv", help="uv, pivot (fewer numbers), int8 (fewer bytes)")
    p.add_argument("--seed", type=flags.seed, default=0, help=flags.SEED)

    p = verb("fuse", "pool compressed or dense parents into one DELVE", writes=True)
    p.add_argument("sources", nargs="+", metavar="SRC", help=SRC), p.add_argument("dst", help=DST)
    p.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT",
                   help="fit the pool weights on it; equal weights without")  # fmt: skip
    p.add_argument("--calibrate-tokens", type=int, default=32768, help=OF_TEXT)
    p.add_argument("--latents", type=int, default=1, metavar="J", help="1: log-linear pool; 0: "
                   "mixture, one latent per parent; between: a mixture of J pools")  # fmt: skip
    p.add_argument("--connectors", default="none", metavar="KIND",
                   help="what a stream hears: none (default), hub, cross or self")  # fmt: skip
    p.add_argument("--hub-rank", type=int, help="of the hub's maps; default: width / 16")
    p.add_argument("--ffn-skip", type=float, default=0.0, metavar="WEIGHT",
                   help="routers: a token skips FFNs that they give less (say 0.5)")  # fmt: skip
    p.add_argument("--warm-hub", action="store_true",
                   help="its maps start as the best guess of what was lost")  # fmt: skip
    p.add_argument("--codes", type=int, metavar="R",
                   help="rank of tables that streams share (default: each its own)")  # fmt: skip
    p.add_argument("--seed", type=flags.seed, default=0, help=flags.SEED)

    p = verb("heal", "train towards the dense parents' pool", writes=True)
    p.add_argument("src", help=SRC), p.add_argument("dst", help=DST)
    p.add_argument("--teachers", nargs="+", metavar="SRC", help="default: those in the config")
    flags.objective(p)
    p.add_argument("--teacher-cache", metavar="DIR",
                   help="samples of what the teachers say, made before training")  # fmt: skip
    p.add_argument("--stages", metavar="FILE.json",
                   help="instead: stages in turn (`hybrid`: built in)")  # fmt: skip
    flags.run(p)

    p = verb("train", "train a preset of any family from random weights", writes=True)
    p.add_argument("preset", help="a name of `delve plan --list`")
    p.add_argument("dst", help=DST)
    p.add_argument("--tokenizer", metavar="SRC", help="tokenizer.json or a source that has one")
    flags.run(p)

    p = verb("plan", "what a run will need, before anything is allocated")
    p.add_argument("target", nargs="?", metavar="PRESET|SRC", help="what is to be trained")
    p.add_argument("--list", action="store_true", help="the presets and their parameters")
    p.add_argument("--keep", type=float, help="kept share of a DELVE preset (0.5)")
    p.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak rate (0.4)")
    p.add_argument(
        "--device", default="h200", help="whose peak rate: h200, h100, a100, v4, v5e, v5p, v6e"
    )
    p.add_argument("--no-compile", action="store_true", help="leave the activations out")
    p.add_argument("--teacher-cache", action="store_true",
                   help="parents' answers are written first, then read")  # fmt: skip
    flags.objective(p)
    flags.run(p, plan=True)

    data = verbs.add_parser("data", help="text to token files; the named datasets",
                            epilog=f"example: {EXAMPLES['data']}")  # fmt: skip
    actions = data.add_subparsers(dest="action", required=True, parser_class=Parser)
    p = actions.add_parser("prepare", help="tokenise text into memory-mapped files",
                           epilog=f"example: {EXAMPLES['data']}")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--overwrite", action="store_true", help="replace DST and work for it")
    p.add_argument("sources", nargs="+", metavar="NAME|FILE",
                   help="text files, names of `delve data list`, or NAME=DIR: a copy")  # fmt: skip
    p.add_argument("dst", help="folder of token files to make")
    p.add_argument("--tokenizer", required=True, metavar="SRC",
                   help="tokenizer.json or a source that has one")  # fmt: skip
    p.add_argument("--text-field", help="of jsonl and parquet; default: the dataset's, else text")
    p.add_argument("--split", choices=("train", "calibrate", "choose", "report"),
                   help="keep only these documents (by their hash)")  # fmt: skip
    p.add_argument("--workers", type=int, help="processes; default: chosen by the cores")
    p.add_argument("--limit-bytes", type=int, help="stop after about so much text")
    p = actions.add_parser("list", help="the named datasets and mixtures",
                           epilog=f"example: {EXAMPLES['list']}")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    _delphi_flags(verbs)

    p = verb("eval", "nll, bits per byte and task metrics")
    p.add_argument("src", help=SRC)
    p.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files to score")
    p.add_argument("--tasks", nargs="+", default=[], metavar="FILE.jsonl", help="tasks to score")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    p.add_argument("--shots", type=int, default=0, metavar="N",
                   help="answered examples before each, the file's first, or ...")  # fmt: skip
    p.add_argument("--shots-from", metavar="FILE.jsonl", help="... those of another file")
    p.add_argument("--mmlu", default="label", choices=("label", "verb"),
                   help="of lettered options: score the letter, or letter and text")  # fmt: skip
    p.add_argument("--run-code", action="store_true",
                   help="HumanEval: run the written code in a limited process")  # fmt: skip
    p.add_argument("--backend", default="jax", choices=("jax", "hf"),
                   help="hf: any causal LM through transformers and torch")  # fmt: skip
    p.add_argument("--trust-remote-code", action="store_true",
                   help="hf backend: run code that comes with the model")  # fmt: skip
    _part_flags(p)
    _memory_flags(p)

    p = verb("export", "checkpoint to a Hugging Face directory", writes=True)
    p.add_argument("src", help=SRC), p.add_argument("dst", help=DST)
    p.add_argument("--layout", choices=("dense", "factored"),
                   help="default: factored for a DELVE, dense (stock) for a parent")  # fmt: skip
    p.add_argument("--results", nargs="+", default=[], metavar="FILE.json",
                   help="for the model card: what `delve eval --json` printed")  # fmt: skip

    p = verb("generate", "continue a text")
    p.add_argument("src", help=SRC)
    p.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (64)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K likeliest ids")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P",
                   help="among the fewest ids that hold the share P")  # fmt: skip
    p.add_argument("--seed", type=flags.seed, default=0, help=flags.SEED)
    _part_flags(p)
    _memory_flags(p)

    p = verb("inspect", "a DELVE on a text: streams, gate, hub, where it gains; JSON and a picture")
    p.add_argument("src", help="a DELVE: " + SRC)
    p.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files to read")
    p.add_argument("--out", metavar="DIR", help="for inspect.json and inspect.png")
    p.add_argument("--parents", nargs="+", metavar="SRC",
                   help="dense models to beat; default: those in the config")  # fmt: skip
    p.add_argument("--window", type=int, help="positions read at once")
    p.add_argument("--limit", type=int, metavar="N", help="the first N tokens only")
    _memory_flags(p)

    p = verb("info", "what a source is: family, parameters, ranks, pool weights")
    p.add_argument("src", help=SRC)
    return top  # fmt: skip


def _part_flags(p: argparse.ArgumentParser) -> None:
    """A part of the model instead of the whole."""
    p.add_argument("--keep", type=float, metavar="R",
                   help="fewer ranks: this share of the dense parents' parameters")  # fmt: skip
    p.add_argument("--streams", type=lambda text: text.split(","), default=[], metavar="A,B",
                   help="of a DELVE, only these streams")  # fmt: skip


def _memory_flags(p: argparse.ArgumentParser) -> None:
    """How a model that is only read lies in memory."""
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                   help="of the parameters in memory (float32); 16 bits: half of it")  # fmt: skip
    p.add_argument("--mesh", help='devices to spread them over, as "model=4"; default: the first')


def _delphi_flags(verbs) -> None:
    """`delve delphi ACTION`."""
    delphi = verbs.add_parser("delphi", help="size a run, and forecast its loss and scores",
                              epilog=f"example: {EXAMPLES['forecast']}")  # fmt: skip
    actions = delphi.add_subparsers(dest="action", required=True, metavar="ACTION",
                                    parser_class=Parser)  # fmt: skip

    def action(name, text, many=True):
        p = actions.add_parser(name, help=text, description=text,
                               epilog=f"example: {EXAMPLES[name]}")  # fmt: skip
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if many is not None:
            p.add_argument("--flops", type=float, required=True, metavar="C",
                           nargs="+" if many else None, help="training budget")  # fmt: skip
        return p

    other = "JSON file of constants in the place of the published ones"
    p = action("candidates", "all widths of the recipe at a budget", many=False)
    p.add_argument("--recipe", metavar="FILE", help=other)
    p = action("recipe", "the whole configuration of a run at a budget", many=False)
    p.add_argument("--recipe", metavar="FILE", help=other)
    p.add_argument("--hidden", type=int, metavar="H", help="width; default: by the T* rule")
    p.add_argument("--batch", type=int, metavar="B", help="rows; default: the recipe's")
    points = "CSV with flops, params, loss and, if known, tokens, steps, batch_size"
    action("fit", "optima and laws of finished runs", None).add_argument("points", help=points)
    p = action("forecast", "loss, interval and configuration at larger budgets")
    p.add_argument("points", help=points)
    p.add_argument("--recipe", metavar="FILE", help=other)
    p = action("sweep", "train and score a ladder of runs; writes DST/points.csv", None)
    p.add_argument("dst", help="folder of the ladder; other budgets and seeds may be added")
    p.add_argument("--flops", type=float, nargs="+", default=[], metavar="C",
                   help="budgets: the recipe's candidates at each")  # fmt: skip
    p.add_argument("--hidden", type=int, nargs="+", default=[], metavar="H", help="only these")
    p.add_argument("--recipe", metavar="FILE", help=other)
    p.add_argument("--tokenizer", metavar="SRC", help="tokenizer.json or a source that has one")
    p.add_argument("--heal", nargs="+", default=[], metavar="SRC",
                   help="instead: compressed or fused checkpoints to heal ...")  # fmt: skip
    p.add_argument("--tokens", type=int, nargs="+", default=[], metavar="N",
                   help="... for each of so many tokens")  # fmt: skip
    p.add_argument("--data", nargs="+", required=True, metavar="TEXT[=WEIGHT]",
                   help="text files or token folders")  # fmt: skip
    p.add_argument("--report-text", nargs="+", required=True, metavar="TEXT",
                   help="held-back text: the loss of a point")  # fmt: skip
    flags.track(p)
    p.add_argument("--seeds", type=flags.seed, nargs="+", default=[0], metavar="N",
                   help="one run each")  # fmt: skip
    p.add_argument("--mesh", help='as "replica=2,data=4,model=2"; default: all devices on data')
    for flag, kind in GIVEN.items():
        p.add_argument("--" + flag.replace("_", "-"), type=kind, help="instead of the recipe's")
    p = action("downstream", "benchmark scores: compute to soft metric to accuracy")
    p.add_argument("scores_csv", metavar="scores", help="CSV with flops, soft (and hard)")
    p.add_argument("--pool", metavar="CSV", help="models with soft, hard; default: the same file")
    p.add_argument("--floor", type=float, help="chance level; default: fitted")


def run(args: argparse.Namespace) -> dict:
    """Call the verb with its flags."""
    kw = {k: v for k, v in vars(args).items() if k not in ("verb", "json", "src", "dst")}
    verb = f"{args.verb} {args.action}" if "action" in kw else args.verb
    if verb in ONE_PROCESS:
        from . import parallel

        parallel.one_process(f"delve {verb}")
    if args.verb == "delphi" and args.action == "sweep":
        from .sweep import sweep

        kw["given"] = {k: v for k in GIVEN if (v := kw.pop(k)) is not None}
        kw |= {"text": kw.pop("data"), "widths": kw.pop("hidden")}
        return sweep(args.dst, **{k: v for k, v in kw.items() if k != "action"})
    if args.verb == "delphi":  # numbers only: starts without JAX
        from .delphi import verbs

        return verbs.run(**kw)
    from . import look, road

    match args.verb:
        case "upcycle":
            from .upcycle import upcycle

            kw["text"] = kw.pop("data")
            return upcycle(kw.pop("parents"), kw.pop("out"), **kw)
        case "fuse":
            return road.fuse(kw.pop("sources"), args.dst, **kw)
        case "heal" | "train":
            from . import training

            kw["text"] = kw.pop("data")
            if args.verb == "heal":
                if kw["stages"]:
                    training.beside_stages(flags.OBJECTIVE & kw.keys())
                kw["terms"] = flags.terms(kw)
            first = args.src if args.verb == "heal" else kw.pop("preset")
            return getattr(training, args.verb)(first, args.dst, flags.settings(kw), **kw)
        case "plan":
            from . import plan

            if kw.pop("list"):
                return plan.listing()
            kw["tokens"] = kw["tokens"] or 0
            settings = flags.settings(kw)
            kw["objective"] = flags.terms(kw) if flags.OBJECTIVE & kw.keys() else None
            return plan.plan(kw.pop("target"), settings, **kw)
        case "data":
            from . import data

            if kw.pop("action") == "list":
                return {"rows": data.listing()}
            return data.prepare(kw.pop("sources"), args.dst, **kw)
        case "eval":
            return look.evaluate(args.src, **kw)
        case "inspect":
            from .diagnose import inspect

            return inspect(args.src, **kw)
        case "convert" | "compress" | "export":
            return getattr(road, args.verb)(args.src, args.dst, **kw)
        case _:
            return getattr(look, args.verb)(args.src, **kw)


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
    except OSError as err:  # a full disk, a folder that may not be written
        print(f"error: {err.filename or args.verb}: {err.strerror or err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if result.get("already"):
        print("already done; nothing to do", file=sys.stderr)
    try:
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            from .show import show

            print(show(args.verb, result), flush=True)
    except BrokenPipeError:  # `| head`: what was asked for is done; Python must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _compile_cache() -> None:
    """Compiled programs are kept in the user's cache folder, so a second run starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "delve_jax" / "jax")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        if jax := sys.modules.get("jax"):  # a caller has read the environment (docs/new_family.md)
            jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
            least = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


if __name__ == "__main__":
    raise SystemExit(main())
