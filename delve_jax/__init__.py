"""delve-jax: several pretrained language models in, one low-rank autoregressive hybrid out.

The public face, imported on first use so that `import delve_jax` starts neither JAX nor torch.
"""

import importlib
import types

_WHERE = {
    "load": "lm", "LM": "lm", "DelveError": "config", "Settings": "train.run",
    "convert": "road", "heal": "training", "export": "road", "generate": "look", "info": "look",
    "inspect": "diagnose",
}  # fmt: skip
_VERB_MODULES = {
    "compress": "road", "fuse": "road", "train": "training", "evaluate": "look",
    "upcycle": "upcycle", "plan": "plan",
}  # fmt: skip
__all__ = [*_WHERE, *_VERB_MODULES]
__version__ = "0.1.0"


def __getattr__(name):
    if name in _VERB_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class VerbModule(types.ModuleType):
    """A module that has a verb's name (`_VERB_MODULES`) and can be called as that verb.

    Importing a submodule puts it in the place of the function, so the module answers for it.
    """

    def __call__(self, *args, **kwargs):
        verb = self.__name__.rpartition(".")[2]
        where = importlib.import_module(f"{__name__}.{_VERB_MODULES[verb]}")
        return getattr(where, verb)(*args, **kwargs)
