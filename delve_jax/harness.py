"""The JAX side as a model of lm-evaluation-harness (pip install lm_eval).

>>> import lm_eval
>>> from delve_jax.harness import DelveLM
>>> lm_eval.simple_evaluate(model=DelveLM("out/healed"), tasks=["piqa", "lambada_openai"])

`python -m delve_jax.harness run --model delve --model_args pretrained=out/healed --tasks piqa` is
lm-eval's own command line with this model registered. Exports need none of it: `--model hf`.
"""

from __future__ import annotations

import sys

import numpy as np

from . import evaluate, lm, tasks
from .config import DelveError

try:
    import lm_eval.models  # noqa: F401  (its own models: it looks for them in an empty registry only)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise DelveError(
        "delve_jax.harness: lm-eval is not installed, or an old one; pip install 'lm_eval>=0.4.13'"
    ) from None

NEW_TOKENS = 256  # where a task does not say how many


@register_model("delve")
class DelveLM(TemplateLM):
    """Any source of `delve_jax.load`, or an LM that is loaded already.

    Tokens as the model's tokenizer makes them, without `<|endoftext|>` in front (lm-eval's way for
    this tokenizer); it stands before a continuation without context and before rolling windows.
    """

    def __init__(
        self, pretrained, batch_size: int | str | None = None, *, device=None, max_batch_size=None,
        **how,
    ):  # fmt: skip
        # lm-eval's command line names a device and a limit for batches to every model: JAX has its
        # own (JAX_PLATFORMS), and batches are cut to the memory that logits may take
        super().__init__()
        self.model = pretrained if hasattr(pretrained, "params") else lm.load(pretrained, **how)
        self._scorer = evaluate.as_scorer(self.model)
        self._batch = None if str(batch_size or "auto").startswith("auto") else int(batch_size)
        self._tok, self._eot = evaluate.tokenizer_of(self._scorer)
        if self._eot is None:
            raise DelveError(f"{pretrained}: lm-eval needs a tokenizer with <|endoftext|>")
        self._told = False  # that answers are shorter than a task asks for

    @property
    def eot_token_id(self) -> int:
        """The id that opens a text."""
        return self._eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; nothing is added."""
        return self._tok.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        jobs = [(np.array([*context, *text], np.int32), len(text)) for _, context, text in requests]
        scored = tasks.continuations(self._scorer, jobs, self._batch, self._eot, "loglikelihood")
        return [(total, greedy) for total, greedy, _ in scored]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in lm-eval's windows: one id of overlap."""
        out = []
        for request in requests:
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self._eot, self._scorer.context_length, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in cut]
            out.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return out

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled continuations, cut before the first of the task's stops.

        Of the window half is the prompt's at least. The seed is a request's place among them: one
        that a task repeats (maj@k) gets another sample each time.
        """
        out, most = [], max(1, self._scorer.context_length // 2)
        for seed, request in enumerate(requests):
            how = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
            n = min(how["max_gen_toks"], most)
            if n < how["max_gen_toks"] and not self._told:
                print(f"delve_jax.harness: max_gen_toks {how['max_gen_toks']}: answers end at {n} "
                      "tokens, half the model's context", file=sys.stderr)  # fmt: skip
                self._told = True
            ids = self.tok_encode(request.args[0])[-max(1, self._scorer.context_length - n) :]
            made = self.model.generate(
                np.array([ids or [self._eot]]), n, stop=[self._eot], seed=seed,
                # like transformers, which `--model hf` runs: sampling that names none is at 1
                temperature=float(how.get("temperature", 1.0)) if how["do_sample"] else 0.0,
                top_k=max(0, int(how.get("top_k") or 0)),  # -1, as vLLM has it: all
                top_p=float(how.get("top_p", 1.0)),
            )  # fmt: skip
            (new,) = evaluate.ended(np.asarray(made)[:, len(ids or [0]) :], [self._eot])
            text = self._tok.decode(new)
            for stop in how["until"]:
                text = text.partition(stop)[0] if stop else text
            out.append(text)
        return out


def main(argv: list[str] | None = None) -> int:
    """lm-eval's command line, in which `--model delve` is known; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    if argv is not None:
        sys.argv = ["lm_eval", *argv]
    try:
        cli_evaluate()
    except DelveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
