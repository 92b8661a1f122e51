"""Training: optim (AdamH, AdamW, schedules), objective (losses), loop (the run), run (settings)."""

import sys

from .. import VerbModule

sys.modules[__name__].__class__ = VerbModule
