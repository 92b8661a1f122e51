"""The notebooks, run from top to bottom in their reduced form; what is committed of them.

Parents are random and tiny, the kernel is this interpreter, everything is written to a temporary
folder. Pictures and numbers are asked for, not what they look like.
"""

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from delve_jax import data, parents
from delve_jax.config import NeoxConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
NAMES = ("upcycle", "inspect", "scaling_law")
SHARED = dict(vocab_size=300, vocab_rows=304, d_model=16, context_length=32)
PARENTS = {  # of the family that compiles fastest
    "one": NeoxConfig(**SHARED, n_layers=2, n_heads=2, d_ffn=32),
    "two": NeoxConfig(**SHARED, n_layers=2, n_heads=4, d_ffn=48),
}


def read(name):
    return nbformat.read(ROOT / "experiments" / "notebooks" / f"{name}.ipynb", as_version=4)


def code_of(name, start):
    """The one code cell that holds this text."""
    (cell,) = (c.source for c in read(name).cells if c.cell_type == "code" and start in c.source)
    return cell


def literals(source):
    """{name: value} of the assignments of constants in a cell."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, AttributeError):
                continue
    return found


@pytest.fixture(scope="module")
def executed(tmp_path_factory, randomised):
    """name -> (folder of results, printed text, number of pictures) of a notebook that ran."""
    root = tmp_path_factory.mktemp("notebooks")
    tok = data.train_bpe([d[:2000] for d in data.stdlib_documents()[:40]], 300)
    for i, (name, cfg) in enumerate(PARENTS.items()):
        params = jax.tree.map(lambda a: np.asarray(a, np.float32), randomised(cfg, i))
        parents.export_stock(cfg, params, root / name, tok)
    kernel = root / "kernels" / "here"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))

    def run(name):
        place, book = root / "place", read(name)  # one for all: inspect takes upcycle's DELVE
        place.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DELVE_NOTEBOOK_SMALL", "1")
            patch.setenv("DELVE_NOTEBOOK_PARENTS", " ".join(str(root / n) for n in PARENTS))
            patch.setenv("IPYTHONDIR", str(root / "ipython"))
            patch.setenv("JUPYTER_RUNTIME_DIR", str(root / "runtime"))
            patch.setenv("JUPYTER_PATH", str(root))
            where = {"metadata": {"path": str(place)}}
            NotebookClient(book, kernel_name="here", timeout=600, resources=where).execute()
        outputs = [o for cell in book.cells for o in cell.get("outputs", ())]
        said = "".join(o.text for o in outputs if o.get("name") == "stdout")
        pictures = sum("image/png" in o.get("data", {}) for o in outputs)
        return place / "out" / "notebooks", said, pictures

    return functools.cache(run)


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs(name):
    book = read(name)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    for i, cell in enumerate(book.cells):
        assert cell.id == f"{name.replace('_', '-')}-{i:02}" and cell.source.strip()
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert [cell.cell_type for cell in book.cells[:2]] == ["markdown", "code"]
    assert book.cells[1].source == read("upcycle").cells[1].source  # the installation


def test_the_first_cell_installs_only_what_is_missing(monkeypatch, tmp_path):
    source, ran, here = read("upcycle").cells[1].source, [], [True]
    monkeypatch.setattr(subprocess, "run", lambda argv, check: ran.append(argv))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here[0] or None)
    monkeypatch.delenv("DELVE_REPO", raising=False)
    monkeypatch.chdir(ROOT / "experiments" / "notebooks")
    exec(source, {})
    assert not ran
    here[0] = False
    exec(source, {})
    assert ran.pop()[-2:] == ["--quiet", str(ROOT)]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="set REPO"):
        exec(source, {})
    assert not ran
    monkeypatch.setenv("DELVE_REPO", "https://host/delve-jax")
    exec(source, {})
    assert ran.pop()[-1] == "git+https://host/delve-jax"


def test_the_ladder_is_that_of_the_results():
    result = json.loads((RESULTS / "ladder.json").read_text())
    told, far = (json.loads((RESULTS / name).read_text())
                 for name in ("ladder_forecast.json", "ladder_far_forecast.json"))  # fmt: skip
    head, *rows = literals(code_of("scaling_law", "LADDER ="))["LADDER"].splitlines()
    numbers = [dict(zip(head.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    assert numbers == [{k: run[k] for k in head.split(",")} for run in result["ladder"]]
    later = literals(code_of("scaling_law", "TARGET_RUNS ="))
    assert later["TARGET_RUNS"] == {run["seed"]: run["loss"] for run in result["target"]}
    runs = result["far"]["rows"]["adamh"]
    assert later["FURTHER_RUNS"] == {run["seed"]: run["loss"] for run in runs}
    assert later["COMMITTED"] == tuple(f["forecasts"][0]["loss"] for f in (told, far))
    call = next(
        node.value
        for node in ast.parse(code_of("scaling_law", "RULES =")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "RULES"
    )
    rules = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert rules == result["toy"] | told["recipe"]


def test_scaling_law(executed):
    out, said, pictures = executed("scaling_law")
    assert pictures == 4
    made = json.loads((out / "forecast.json").read_text())
    told = json.loads((RESULTS / "ladder_forecast.json").read_text())
    first, further = made["forecasts"]
    assert first["loss"] == pytest.approx(told["forecasts"][0]["loss"], rel=1e-9)
    # of fewer samples than the committed one
    assert first["interval"] == pytest.approx(told["forecasts"][0]["interval"], abs=0.02)
    assert further["loss"] < first["loss"] and first["config"] == told["forecasts"][0]["config"]
    assert "30 runs at 5 budgets" in said and "off by -0.07%" in said and "off by -2.02%" in said


def test_upcycle(executed):
    out, said, pictures = executed("upcycle")
    assert pictures == 3
    report = json.loads((out / "delve" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {*PARENTS, *(f"{n} compressed" for n in PARENTS), "DELVE at step 0",
                         "DELVE healed"}  # fmt: skip
    assert 0.45 < report["keep"] <= 0.5 and report["export"]["verified"]
    assert rows["DELVE healed"]["nll_per_token"] < rows["DELVE at step 0"]["nll_per_token"]
    differ = float(said.split("logits differ by at most ")[1].split(";")[0])
    assert 0 <= differ < 1e-3 and "transformers_modules" in said
    assert "greedy tokens are the same: True" in said
    assert f"{rows['DELVE healed']['bits_per_byte']:.4f}" in said


def calls(source, name):
    """The calls of a function in a cell, as text."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [ast.unparse(n) for n in nodes if getattr(n.func, "attr", None) == name]


def test_inspect_would_make_the_same_delve():
    (made,) = calls(code_of("upcycle", "delve_jax.upcycle("), "upcycle")
    assert calls(code_of("inspect", "delve_jax.upcycle("), "upcycle") == [made]
    sizes = [set(code_of(name, "SMALL =").splitlines()) for name in ("upcycle", "inspect")]
    assert sizes[0] <= sizes[1]


def test_inspect(executed):
    executed("upcycle")
    out, said, pictures = executed("inspect")
    assert pictures == 3
    look = json.loads((out / "inspect" / "inspect.json").read_text())
    assert set(look["streams"]) == set(look["parents"]) == set(PARENTS)
    start, healed = (line for line in said.splitlines() if "a gate weight moves" in line)
    assert start.startswith("step 0") and "by up to 0.0000 (" in start
    assert "by up to 0.0000 (" not in healed
    parts = json.loads((out / "parts.json").read_text())
    for model in ("healed as a whole", "healed with parts left out"):
        subsets = {tuple(p["streams"]): p for p in parts["subsets"] if p["model"] == model}
        assert set(subsets) == {("one",), ("two",), ("one", "two")}
        whole = subsets["one", "two"]
        assert all(p["parameters"] <= whole["parameters"] for p in subsets.values())
        first, *fewer = (p for p in parts["ranks"] if p["model"] == model)
        # random parents: weights of the pool that nearly cancel are scaled to their sum again
        assert first["nll"] == pytest.approx(whole["nll"], abs=1e-3)
        assert fewer and all(p["parameters"] < first["parameters"] for p in fewer)
        if model == "healed as a whole":
            assert whole["nll"] == pytest.approx(look["nll_per_token"], abs=1e-3)
