"""A checkpoint out to a Hugging Face directory (the way back in: `delve.py`).

A DELVE carries its own PyTorch files (`remote/`, loaded with trust_remote_code); a parent leaves as
a stock directory, or, factored, as a DELVE of one stream. Nothing takes the name DST before the
directory was reloaded and gave the logits of the JAX model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import checkpoint
from ..config import (
    Config,
    DelveConfig,
    DelveError,
    ParentConfig,
    read_json,
    to_json,
    write_json,
)
from ..models.delve import whole
from . import card
from .delve import entries, leaf_at, leaves, read_exported_delve

__all__ = [
    "check_blocks", "densify", "export_hf", "read_exported_delve", "verify_hf", "write_tokenizer",
]  # fmt: skip

REMOTE = Path(__file__).parent / "remote"
RECORD = "delve_export.json"  # what was exported from where; makes a repeated command a no-op
SHARD_BYTES = 4 << 30
SMALL = 20_000_000
BLOCKS = ("mamba", "rwkv", "neox")  # families that remote/modeling_delve.py has a block of
TOLERANCE = 1e-4  # of max |logit|, float32 on both sides
ROUNDED = 3e-2  # the same where products of factors were rounded to a 16-bit dtype


def as_delve(cfg: Config, params: dict) -> tuple[DelveConfig, dict]:
    """A single parent as a DELVE of one stream, pooled with weight 1, without hub and gate."""
    if cfg.family == "delve":
        return cfg, params
    one = DelveConfig(
        streams=((cfg.family, cfg),), n_superblocks=1, latents=1, gate_proj=0, gate_hidden=0,
        dtype=cfg.dtype,
    )  # fmt: skip
    return one, {"streams": {cfg.family: params}, "pool": {"a": np.ones(1, np.float32)}}


def check_blocks(streams: Sequence[tuple[str, ParentConfig]]) -> None:
    """DelveError where a stream has no PyTorch block: its DELVE cannot leave for transformers."""
    for name, sub in streams:
        if sub.family not in BLOCKS:
            raise DelveError(
                f"stream {name}: family '{sub.family}' has no PyTorch block in "
                f"delve_jax/parents/remote/modeling_delve.py ({', '.join(BLOCKS)} have), so it "
                "cannot be exported in a DELVE; the checkpoint works as it is, `delve convert "
                "--streams` makes one without the stream, a parent alone goes with --layout dense"
            )


def densify(cfg: DelveConfig, params: dict) -> tuple[DelveConfig, dict]:
    """The same model with every factored map multiplied out (float64), in the factors' dtype."""

    def walk(tree):
        if not isinstance(tree, dict):
            return tree
        if "v" in tree and "u" in tree:  # "v" alone: attention's map of values
            v, u = (np.asarray(tree[side]).astype(np.float64) for side in "vu")
            kernel = np.matmul(v, u).astype(tree["v"].dtype)
            return {"kernel": kernel, **{k: a for k, a in tree.items() if k not in "vu"}}
        return {name: walk(sub) for name, sub in tree.items()}

    streams = tuple(
        (name, dataclasses.replace(sub, ranks=(), nested=())) for name, sub in cfg.streams
    )
    dense = {**params, "streams": walk(whole(cfg, params))}
    dense.pop("codes", None)
    return dataclasses.replace(cfg, streams=streams, codes=()), dense


def _dtype(params: dict) -> str:
    """Storage dtype of most elements."""
    sizes: dict[str, int] = {}
    for _, leaf in leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    return max(sizes, key=sizes.get)


def _special_ids(cfg: DelveConfig, tokenizer_json: str | None) -> dict[str, int]:
    """eos, bos, pad ids: the tokenizer's <|endoftext|> and <|padding|>, else the first parent's."""
    known = {}
    if tokenizer_json:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        known = {token["content"]: token["id"] for token in added}
    source = json.loads(cfg.streams[0][1].hf_config or "{}")
    ids = {"eos_token_id": known.get("<|endoftext|>", source.get("eos_token_id"))}
    ids["bos_token_id"] = known.get("<|endoftext|>", source.get("bos_token_id"))
    ids["pad_token_id"] = known.get("<|padding|>", ids["eos_token_id"])
    return {k: v for k, v in ids.items() if isinstance(v, int) and 0 <= v < cfg.vocab_size}


def write_tokenizer(folder: Path, tokenizer_json: str, ids: dict, context_length: int) -> None:
    """tokenizer.json as it is, and the tokenizer_config.json that AutoTokenizer needs."""
    folder.joinpath("tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    added = {t["id"]: t["content"] for t in json.loads(tokenizer_json).get("added_tokens") or []}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{k.removesuffix("_id"): added[v] for k, v in ids.items() if v in added},
    }
    write_json(folder / "tokenizer_config.json", config, indent=2)


def _write_tensors(folder: Path, cfg: DelveConfig, params: dict) -> None:
    """model.safetensors, or numbered shards and their index where the model is large."""
    from safetensors.numpy import save_file

    shards, size = [[]], 0
    total, sizes = 0, {}
    for entry in entries(cfg):
        leaf = leaf_at(params, entry.path)
        sizes[entry.key] = entry.elements(leaf.shape) * leaf.dtype.itemsize
        if shards[-1] and size + sizes[entry.key] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + sizes[entry.key], total + sizes[entry.key]
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        host, tensors = {}, {}
        for entry in shard:
            if entry.path not in host:
                host = {entry.path: np.asarray(leaf_at(params, entry.path))}
            tensors[entry.key] = entry.to_torch(host[entry.path])
            index[entry.key] = name
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        data = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", data, indent=2)


def _hf_config(cfg: DelveConfig, layout: str, dtype: str, ids: dict) -> dict:
    """config.json of an exported DELVE: our fields, and what transformers asks of a config."""
    fields = to_json(cfg)
    fields.pop("family")
    fields["dtype"] = dtype
    kinds = [
        "full_attention" if sub.family == "neox" else "linear_attention"
        for _, sub in cfg.streams
        for _ in range(sub.n_layers)
    ]
    return {
        "architectures": ["DelveForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_delve.DelveConfig",
            "AutoModelForCausalLM": "modeling_delve.DelveForCausalLM",
        },
        "model_type": "delve",
        "layout": layout,
        "vocab_size": cfg.vocab_size,
        "hidden_size": sum(sub.d_model for _, sub in cfg.streams),
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "number_of_conv_states": 2,
        "max_position_embeddings": cfg.context_length,
        "tie_word_embeddings": False,
        "transformers_version": importlib.metadata.version("transformers"),
        **ids,
        **fields,
    }


def _write_delve(folder: Path, cfg, params, layout: str, tokenizer_json: str | None) -> None:
    from ..lineage import public_source

    cfg, params = as_delve(cfg, params)
    # paths of this machine are private, and of no use elsewhere
    cfg = dataclasses.replace(cfg, teachers=tuple(map(public_source, cfg.teachers)))
    if layout == "dense":
        cfg, params = densify(cfg, params)
    ids = _special_ids(cfg, tokenizer_json)
    write_json(folder / "config.json", _hf_config(cfg, layout, _dtype(params), ids), indent=2)
    write_json(folder / "generation_config.json", {**ids, "use_cache": True}, indent=2)
    _write_tensors(folder, cfg, params)
    for source in sorted(REMOTE.glob("*_delve.py")):
        shutil.copyfile(source, folder / source.name)
    if tokenizer_json:
        write_tokenizer(folder, tokenizer_json, ids, cfg.context_length)


def verify_hf(folder: Path, cfg: Config, params: dict, rows: int = 2, length: int = 24):
    """Reload a written directory with transformers -> (max |logit difference|, max |logit|).

    Both sides compute in float32 on the same fixed random tokens; None where torch is missing.
    """
    try:
        import torch
    except ImportError:
        return None
    import jax
    from transformers import AutoModelForCausalLM

    from .. import models

    extra = {"rescale_every": 0} if cfg.family == "rwkv" else {}
    if read_json(folder / "config.json").get("model_type") == "delve":
        extra = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **extra
    ).eval()
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length))
    threads = torch.get_num_threads()
    if model.num_parameters() < SMALL:  # on busy cores threads cost such a model 25x its time
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens_BT), use_cache=False).logits.float().numpy()
    finally:
        torch.set_num_threads(threads)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, t: models.forward(cfg, p, t)[0])
        ours = np.asarray(run(params, tokens_BT.astype(np.int32)))
    theirs = theirs[..., : cfg.vocab_size]  # a stock directory may store padding rows
    return float(np.abs(ours - theirs).max()), float(np.abs(ours).max())


def _fingerprint(src: Path, layout: str, results: Sequence[dict]) -> dict:
    """What identifies an export: same source, unchanged, same layout, same results on its card."""
    digest = hashlib.sha256((checkpoint.fingerprint(src) + json.dumps(list(results))).encode())
    stamp = (checkpoint.home_of(src) / "config.json").stat().st_mtime_ns
    return {"source": src.name, "config": digest.hexdigest()[:16], "stamp": stamp,
            "layout": layout}  # fmt: skip


def export_hf(
    src: str | Path,
    dst: str | Path,
    layout: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    results: Sequence[dict] = (),
) -> dict:
    """Checkpoint directory -> Hugging Face directory; returns what was written and checked.

    layout "factored" keeps u and v (a DELVE's default), "dense" multiplies them out (a parent's
    default: a stock directory). results: for the model card (`card.write`). Keys of what is
    returned: verified, max_abs_diff, max_abs_logit, files, parameters, layout, path. DelveError: no
    checkpoint at SRC, DST taken, a stream without a PyTorch block, logits that differ.
    """
    from .. import lineage, models
    from ..compress import storage

    src, dst = Path(src), Path(dst)
    cfg = checkpoint.load_config(src)
    layout = layout or ("factored" if cfg.family == "delve" else "dense")
    if layout not in ("factored", "dense"):
        raise DelveError(f"--layout {layout}: must be dense or factored")
    if cfg.family == "delve" or layout == "factored":
        check_blocks(cfg.streams if cfg.family == "delve" else [(cfg.family, cfg)])
    made_of = _fingerprint(src, layout, results)
    if (dst / RECORD).is_file() and not overwrite:
        record = read_json(dst / RECORD)
        if record.pop("made_of", None) == made_of:
            return {**record, "already": True, "path": str(dst)}
    with checkpoint.writing(dst, overwrite, fresh=True) as partial:
        cfg, params = storage.convert(*checkpoint.restore(src), "uv")
        tokenizer_json = checkpoint.load_tokenizer(src)
        if cfg.family != "delve" and layout == "dense":
            from . import export_stock

            export_stock(cfg, params, partial, tokenizer_json)
        else:
            _write_delve(partial, cfg, params, layout, tokenizer_json)
        facts = _check(partial, dst, cfg, params, layout, verify)
        facts["parameters"] = models.count(cfg) if layout == "factored" else facts["stored"]
        facts.pop("stored")
        steps = lineage.read(checkpoint.home_of(src))
        if steps:
            write_json(partial / lineage.FILE, {"steps": steps}, indent=2)
        text = card.write(cfg, facts, steps, results)
        (partial / "README.md").write_text(text, encoding="utf-8")
        facts["files"] = sorted(p.name for p in partial.glob("[!.]*"))
        write_json(partial / RECORD, {**facts, "made_of": made_of}, indent=2)
    return {**facts, "path": str(dst)}


def _check(partial: Path, dst: Path, cfg: Config, params: dict, layout: str, verify: bool) -> dict:
    """Reload the directory and hold it to the tolerance; DelveError where it gives other logits."""
    found = verify_hf(partial, cfg, params) if verify else None
    if verify and found is None:
        print(
            "warning: torch is not installed, the export was not verified (pip install torch)",
            file=sys.stderr,
        )
    hf, dtype = read_json(partial / "config.json"), _dtype(params)
    subs = [sub for _, sub in cfg.streams] if cfg.family == "delve" else [cfg]
    rounded = layout == "dense" and dtype != "float32" and any(sub.ranks for sub in subs)
    tolerance = ROUNDED if rounded else TOLERANCE
    if found is not None and not found[0] <= tolerance * found[1]:
        raise DelveError(
            f"{dst}: not written: the exported model's logits differ from the checkpoint's by "
            f"{found[0]:.2e} (allowed: {tolerance * found[1]:.2e}); please report this"
        )
    return {
        "verified": found is not None,
        "max_abs_diff": None if found is None else found[0],
        "max_abs_logit": None if found is None else found[1],
        "layout": layout,
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "model_type": hf.get("model_type"),
        "stored": _stored(partial),
    }


def _stored(folder: Path) -> int:
    """Elements in the safetensors files of a directory."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(int(np.prod(file.get_slice(k).get_shape())) for k in file.keys())
    return total
