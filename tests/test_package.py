"""What is installed: wheel and sdist are whole, start in an empty environment, and name licences.

Nothing is fetched: the build backend of the running environment is called, and the new environment
sees the installed dependencies through a .pth file, but not the editable install of this checkout
(an editable install is a .pth file itself, which is read in an environment's own folder only).
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(what: str, source: Path, out: Path) -> Path:
    """The file that the build backend makes of a folder, as pip and `python -m build` call it."""
    done = subprocess.run(
        [sys.executable, "-c", BACKEND, what, out], cwd=source, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from it): the road of a release."""
    work = tmp_path_factory.mktemp("build")
    source = work / "checkout"
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", "build")
    for name in ("delve_jax", "tests", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    sdist = build("build_sdist", source, work)
    with tarfile.open(sdist) as tar:
        tar.extractall(work, filter="data")
    return sdist, build("build_wheel", work / sdist.name.removesuffix(".tar.gz"), work)


def test_wheel_and_sdist_hold_the_package(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (entry,) = [file.read(n).decode() for n in names if n.endswith("entry_points.txt")]
        (facts,) = [file.read(n).decode() for n in names if n.endswith("METADATA")]
    ours = [p.relative_to(ROOT).as_posix() for p in (ROOT / "delve_jax").rglob("*") if p.is_file()]
    ours = {name for name in ours if "__pycache__" not in name}
    assert {n for n in names if n.startswith("delve_jax/")} == ours
    assert {"delve_jax/py.typed", "delve_jax/proxies/rwkv/model.safetensors"} <= ours
    assert any(name.startswith("delve_jax/parents/remote/") for name in ours)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"delve_jax", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert "delve = delve_jax.cli:main" in entry
    assert "License-Expression: Apache-2.0" in facts and "License-File: LICENSE" in facts
    needs = {canonicalize_name(n) for n in re.findall(r"^Requires-Dist: ([\w.-]+)", facts, re.M)}
    assert needs == direct("requirements.txt")
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "requirements.txt", "README.md", "LICENSE"} | ours <= inside


def test_wheel_runs_in_an_empty_environment(built, tmp_path):
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--no-index", built[1]], check=True,
    )  # fmt: skip
    (site,) = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import sys, delve_jax, importlib.metadata as m; "
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules; "
        "print(delve_jax.__file__, delve_jax.__version__ == m.version('delve-jax'))"
    )

    def run(*command):
        # a PYTHONPATH of the caller's would come before what is installed
        rest = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=rest
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(python, "-c", code).split() == [str(site / "delve_jax" / "__init__.py"), "True"]
    said = run(env / "bin" / "delve", "--help")
    assert "VERB" in said and "upcycle" in said
    assert run(python, "-m", "delve_jax", "heal", "--help").startswith("usage: delve heal")
    proxy = site / "delve_jax" / "proxies" / "rwkv"
    facts = json.loads(run(env / "bin" / "delve", "info", proxy, "--json"))
    assert facts["family"] == "rwkv" and facts["parameters"] == 1_528_448


def direct(file: str) -> set[str]:
    """Canonical names of the packages that a requirements file names."""
    lines = (ROOT / file).read_text().splitlines()
    named = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in lines)
    return {canonicalize_name(match[0]) for match in named if match}


def test_licences_of_all_direct_requirements_are_listed():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \| ([^|]+) \| (\w+) \|$",
                      (ROOT / "docs" / "licences.md").read_text(), re.M)  # fmt: skip
    listed = {row[0]: row[1:] for row in rows}
    for file, use in (("requirements.txt", "runtime"), ("requirements-dev.txt", "development")):
        for name in direct(file):
            versions, licence, needed_for = listed[name]
            assert needed_for == use and licence not in ("", "not named")
            line = next(n for n in (ROOT / file).read_text().splitlines()
                        if canonicalize_name(re.split(r"[<>=]", n)[0]) == name)  # fmt: skip
            wanted = re.split(r"[,]", re.sub(r"^[\w.-]+?(?=[<>=])", "", line.strip()))
            assert sorted(versions.split(",")) == sorted(wanted), (
                f"{name}: python experiments/licences.py"
            )


def test_licences_script_reads_metadata():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import licences
    finally:
        sys.path.pop(0)
    assert licences.licence("numpy") == importlib.metadata.metadata("numpy")["License-Expression"]
    assert licences.licence("jax") == licences.licence("flax") == "Apache-2.0"
    assert "jaxlib" in licences.through(["jax"]) and "jax" not in licences.through(["jax"])
