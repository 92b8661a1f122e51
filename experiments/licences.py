"""Under which licences stand the packages that delve-jax needs, directly and through others?

Command: python experiments/licences.py; writes docs/licences.md from requirements.txt,
requirements-dev.txt and what the installed packages say of themselves (importlib.metadata). It
takes seconds. Exit 1 where a direct requirement is not installed or names no licence. What is
needed on other platforms only (CUDA, TPU, Windows) does not stand there: it is not installed here.
"""

import importlib.metadata as metadata
import re
import sys
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "licences.md"
UNKNOWN = "not named"
# free text and old classifiers -> SPDX (https://spdx.org/licenses/); the first that fits counts
SPDX = (
    (r"^\S+ (AND|OR) \S+$", None),  # an expression already
    (r"Apache( Software)?( License)?,? *(Version )?2|^Apache( Software License)?$", "Apache-2.0"),
    (r"^Mozilla Public License 2\.0 \(MPL 2\.0\)$|^MPL-2\.0$", "MPL-2.0"),
    (r"^Python Software Foundation License$|^PSF-2\.0$", "PSF-2.0"),
    (r"BSD[- ]3[- ]Clause|^(3-Clause|New) BSD", "BSD-3-Clause"),
    (r"BSD[- ]2[- ]Clause", "BSD-2-Clause"),
    (r"^BSD( License)?$", "BSD"),
    (r"^MIT$|^(The )?MIT License", "MIT"),
    (r"^ISC", "ISC"),
)


def requirements(file: str) -> dict[str, Requirement]:
    """The packages of a requirements file by their canonical name; `-r` lines are left out."""
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    found = map(Requirement, (line for line in lines if line and not line.startswith("-")))
    return {canonicalize_name(r.name): r for r in found}


def licence(name: str) -> str:
    """SPDX expression of an installed package, from its metadata; UNKNOWN where it has none."""
    facts = metadata.metadata(name)
    if expression := facts.get("License-Expression"):
        return expression
    classifiers = [
        c.split(" :: ")[-1] for c in facts.get_all("Classifier", ()) if "License ::" in c
    ]
    text = re.sub(r"\s+", " ", facts.get("License") or "").strip()
    # the first words of a licence text may say less than the classifiers do
    named = " / ".join(classifiers)
    for words in (text[:80], named):
        for pattern, spdx in SPDX:
            if re.search(pattern, words):
                return spdx or words
    return (text if " " not in text else "") or named or text[:40] or UNKNOWN


def through(names) -> set[str]:
    """Canonical names of all installed packages that these need, themselves left out."""
    seen, todo = set(), list(names)
    while todo:
        parent = todo.pop()
        for line in metadata.requires(parent) or ():
            need = Requirement(line)
            name = canonicalize_name(need.name)
            env = {**default_environment(), "extra": ""}
            if name in seen or (need.marker and not need.marker.evaluate(env)):
                continue
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            seen.add(name)
            todo.append(name)
    return seen - set(names)


def table(names, ranges: dict, use) -> list[str]:
    """Rows of Markdown, by name."""
    return [
        "| package | versions | licence | for |",
        "|---|---|---|---|",
        *(f"| {n} | {ranges[n] if n in ranges else metadata.version(n)} | {licence(n)} | {use(n)} |"
          for n in sorted(names)),
    ]  # fmt: skip


def main() -> int:
    """Write the file; 1 where a direct requirement has no licence or is not there."""
    run, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    try:
        unknown = [n for n in (*run, *dev) if licence(n) == UNKNOWN]
    except metadata.PackageNotFoundError as err:
        print(f"error: {err}; install requirements-dev.txt first", file=sys.stderr)
        return 1
    if unknown:
        print(f"error: {unknown[0]}: its metadata names no licence", file=sys.stderr)
        return 1
    ranges = {n: str(r.specifier) for n, r in (dev | run).items()}
    further = through(run)
    lines = [
        "# Licences of what delve-jax needs",
        "",
        "delve-jax itself is Apache-2.0 (`LICENSE`). `python experiments/licences.py` wrote this",
        "from the metadata of the installed packages (Linux, CPU); no file of theirs was read.",
        "BSD: the metadata does not say which.",
        "",
        "## Named in requirements.txt (runtime) and requirements-dev.txt (development)",
        "",
        *table([*run, *dev], ranges, lambda n: "runtime" if n in run else "development"),
        "",
        "## Needed by those, with the version that was installed",
        "",
        *table(through([*run, *dev]), {}, lambda n: "runtime" if n in further else "development"),
        "",
        "Not installed here: what jax needs on a GPU or TPU (`jax[cuda13]`, `jax[tpu]`: NVIDIA's",
        "libraries and libtpu stand under their makers' own terms), and the optional trackers",
        "tensorboardX and wandb (both MIT by their metadata).",
    ]  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")
    print(f"{RESULT.relative_to(ROOT)}: {len(run)} + {len(dev)} direct, {len(lines)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
