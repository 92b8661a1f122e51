"""Run by test_export.py in a process of its own: an exported directory must need no delve_jax.

`python -I export_reload.py DIR FILE.npz`: loads DIR where delve_jax, jax and flax cannot be
imported, compares with the arrays of FILE.npz and prints one JSON object.
"""

import json
import sys
import tempfile

BLOCKED = ("delve_jax", "jax", "jaxlib", "flax", "orbax", "optax")


class Block:
    """A finder that refuses the blocked packages, installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this process")


sys.meta_path.insert(0, Block())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(path, **kwargs):
    kwargs = {"trust_remote_code": True, "local_files_only": True, **kwargs}
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def main(folder, expected):
    data = np.load(expected)
    ids, mask = torch.from_numpy(data["tokens"]), torch.from_numpy(data["mask"]).long()
    real = data["mask"].astype(bool)
    model = load(folder)
    out = {}
    torch.set_num_threads(1)

    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.numpy()
    out["difference"] = float(np.abs(logits - data["logits"])[real].max())
    out["scale"] = float(np.abs(data["logits"])[real].max())

    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        with torch.no_grad():
            same = load(again)(ids, attention_mask=mask).logits.numpy()
        out["saved_again"] = float(np.abs(same - logits).max())

    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    out["no_gradient"] = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().max() > 0
    ]

    half = load(folder, dtype=torch.bfloat16)
    out["kept_float32"] = sorted(
        {n.split(".")[-1] for n, p in half.named_parameters() if p.dtype == torch.float32}
    )
    with torch.no_grad():
        rough = half(ids, attention_mask=mask).logits.numpy()
    out["bfloat16_difference"] = float(np.abs(rough - logits)[real].max())

    text = str(data["text"])
    out["text_ids"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text)[
        "input_ids"
    ]
    out["leaked"] = sorted(name for name in sys.modules if name.split(".")[0] in BLOCKED)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
