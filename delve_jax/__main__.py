"""`python -m delve_jax` is `delve`."""

from .cli import main

raise SystemExit(main())
