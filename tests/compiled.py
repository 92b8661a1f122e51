"""`models.forward` as one program: called as it is, every operation is compiled by itself, and a
scan anew at every call."""

import jax

from delve_jax import models

forward = jax.jit(models.forward, static_argnames=("cfg", "how"))
