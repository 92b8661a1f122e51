"""Every fenced command of the pages runs: `delve ...` here, the others where a table says.

Pages: those of test_docs.py. A page is one story: its `delve` commands run in its order in one
folder, in this process, so that later ones read what earlier ones wrote. Tiny models and texts lie
where the page expects what it does not make itself (`stand_ins`); flags that cut a run's size come
after the page's own (SMALLER), where the last one counts.
"""

import contextlib
import csv
import functools
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import zstandard
from test_delphi import runs_of, write
from test_docs import FENCE, PAGES, ROOT, commands, lines_of
from test_downstream import files as downstream_files

from delve_jax import cli, data, parents, presets, sweep
from delve_jax.config import NeoxConfig, RwkvConfig

# ---- the tables ----------------------------------------------------------------------------------

# (which commands, what comes after the page's flags, why)
SMALLER = (
    (r"delve compress ", "--calibrate-tokens 256", "65,536 by default"),
    (r"delve (heal|train) ", "--tokens 128 --batch 4 --window 32", "the context of the stand-ins"),
    (r"delve heal .* --mesh data=8 ", "--mesh data=1", "a test has one device; eight: "
     "tests/test_parallel.py"),
    (r"delve plan ", "--no-compile", "a minute; with it: tests/test_plan.py, tests/test_tiers.py"),
    (r"delve delphi sweep .* --flops ", "--recipe toy.json --hidden 16 --flops {flops}",
     "budgets a ten-thousand-millionth, widths of the toy recipe"),
)  # fmt: skip
# commands that are not run here: why, the file that runs them or their code, the words that do
EXCUSED = {
    r"delve upcycle --parents .* --out out/delve-0\.4b": (
        "a minute also when all is tiny", "tests/test_cli.py",
        'return ["upcycle", "--parents", *sources'
    ),
    r"delve upcycle (--keep 0\.5 )?--out out/quickstart": (
        "a minute also when all is tiny", ".ci/run", "make quickstart"
    ),
    r"delve delphi sweep out/heal --heal .*": (
        "half a minute", "tests/test_sweep.py", "def test_a_ladder_of_healing("
    ),
    r"delve heal shared/fused .* --distributed 10\.0\.0\.2:9876,4,0": (
        "four hosts; by two processes:", "tests/test_hybrid_verbs.py",
        "def test_two_processes_heal_a_hybrid("
    ),
}  # fmt: skip
# what a page calls by a name that has the size in it
RENAMED = {"C3e+18-h512-s0": "C3e+08-h16-s0"}
# presets by these names are tiny: the command line names no other size
TINY_PRESETS = ("delphi-2560",)

# every other fenced line of shell: the lines, who runs them, and the words in that file that do
ELSEWHERE = (
    (r"make (quickstart|test)( +#.*)?", ".ci/run", "make {1}"),
    (r"pip install -e \.", "Makefile", "pip install --quiet --no-deps -e ."),
    (r"python docs/examples/olmo\.py .*", "tests/test_new_family.py", "for command in commands():"),
    (r"python experiments/tables\.py( +#.*)?", "tests/test_doc_commands.py", "tables.main([])"),
    (r"python experiments/tables\.py --check( +#.*)?", "tests/test_readme.py", '"--check"'),
    (r"python experiments/upcycle_04b\.py --dry-run --no-compile", "tests/test_tiers.py",
     '["--dry-run", "--no-compile", '),
    (r"python experiments/reference_pool\.py .*", "tests/test_tasks.py",
     "reference_pool.main(argv)"),
)  # fmt: skip

# ---- what lies there -----------------------------------------------------------------------------

SHARED = dict(vocab_size=300, vocab_rows=300, d_model=16, context_length=32, n_layers=1)
FAMILIES = {
    "rwkv": RwkvConfig(**SHARED, d_att=16, d_ffn=32),
    "neox": NeoxConfig(**SHARED, n_heads=2, d_ffn=32),
}
TOY = {"seq_len": 32, "vocab_size": 300, "head_dim": 8, "min_hidden": 16, "fine_step": 16,
       "max_steps": 16, "min_batch": 1, "T0": 1e4, "B0": 4}  # fmt: skip


def run(*argv) -> None:
    assert cli.main(list(map(str, argv))) == 0, argv


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, randomised) -> dict[str, Path]:
    """Name on a page -> what lies there if the page does not make it."""
    root = tmp_path_factory.mktemp("stand-ins")
    documents = [d[:1500] for d in data.stdlib_documents()[:48]]
    tokenizer = data.train_bpe(documents, 300)
    texts = {"held_back.txt": documents[36:40], "text.txt": documents[40:]}
    for name, part in {"train.txt": documents[:24], **texts}.items():
        (root / name).write_text("\n<|endoftext|>\n".join(part))
    rows = "".join(json.dumps({"text": d}) + "\n" for d in documents[:24])
    (root / "corpus.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    out = root / "out"
    for i, name in enumerate(("rwkv", "neox")):
        params = jax.tree.map(lambda a: np.asarray(a, np.float32), randomised(FAMILIES[name], i))
        parents.export_stock(FAMILIES[name], params, root / name, tokenizer)
        run("compress", root / name, root / f"{name}-small", "--keep", 0.5, "--method", "svd")
    neox = root / "neox"
    run("convert", neox, out / "pythia")
    shutil.copytree(root / "neox-small", out / "pythia-small")
    run("fuse", root / "rwkv-small", root / "neox-small", out / "fused")
    shutil.copytree(out / "fused", out / "healed")
    run("data", "prepare", root / "train.txt", out / "tokens", "--tokenizer", neox)
    for name in ("out/code", "TOKENS"):
        shutil.copytree(out / "tokens", root / name)
    mmlu = [{"question": f"{i} and {i}?", "choices": list("abcd"), "answer": i % 4, "subject": "x"}
            for i in range(8)]  # fmt: skip
    (root / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmlu))
    # a law that is known: the toy ladder is too short to have optima between its widths
    law = write(root / "points.csv", runs_of(budgets=4, runs=7, noise=1e-3))
    for name in ("ladder", "pool"):
        (out / name).mkdir()
    shutil.copy(law, out / "ladder")
    winners, pool = downstream_files(root)
    shutil.move(winners, root / "winners.csv")
    shutil.move(pool, out / "pool" / "mmlu.csv")
    names = [*texts, "corpus.jsonl.zst", "mmlu.jsonl", "points.csv", "winners.csv", "TOKENS",
             "out/pythia", "out/pythia-small", "out/fused", "out/healed", "out/tokens", "out/code",
             "out/ladder/points.csv", "out/pool/mmlu.csv"]  # fmt: skip
    (root / "toy.json").write_text(json.dumps(TOY))
    return {name: root / name for name in names}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The presets of the table."""
    with pytest.MonkeyPatch.context() as patch:
        for name in TINY_PRESETS:
            assert name in presets.PRESETS
            patch.setitem(presets.PRESETS, name, lambda: FAMILIES["neox"])
        yield


# ---- delve ---------------------------------------------------------------------------------------

STORIES = {page: said for page in PAGES if (said := commands(page, "delve "))}
ALL = [
    pytest.param(page, i, id=f"{page.stem}-{i}-{words[1]}")
    for page, said in STORIES.items()
    for i, words in enumerate(said)
    if not any(re.fullmatch(line, " ".join(words)) for line in EXCUSED)
]


def written(words: list[str]) -> str | None:
    """What a command makes."""
    args = parsed(words)
    return args.get("dst") or args.get("out")


def parsed(words: list[str]) -> dict:
    return vars(cli.parser().parse_args(words[1:]))


def mentioned(name: str, words: list[str]) -> bool:
    return any(re.fullmatch(rf"{re.escape(name)}(=.*)?", word) for word in words)


def smaller(words: list[str]) -> list[str]:
    """A command of a page as it is run here."""
    line = " ".join(words) + " "
    for old, new in RENAMED.items():
        words = [word.replace(old, new) for word in words]
    facts = {}
    if "--flops" in words:
        facts["flops"] = " ".join(f"{C / 1e10:g}" for C in np.atleast_1d(parsed(words)["flops"]))
    more = [flags.format(**facts) for said, flags, _ in SMALLER if re.match(said, line)]
    return [*words[1:], *shlex.split(" ".join(more))]


@pytest.fixture(scope="module")
def told(stand_ins, tmp_path_factory):
    """(page, i) -> exit code, stdout, stderr and folder of its ith command, after those before."""

    @functools.cache
    def place(page) -> Path:
        folder = tmp_path_factory.mktemp(page.stem)
        shutil.copy(stand_ins["text.txt"].with_name("toy.json"), folder)
        return folder

    def tell(page, i, capsys):
        if (page, i) in done:
            return done[page, i]
        if before := [p.values[1] for p in ALL if p.values[0] == page and p.values[1] < i]:
            tell(page, before[-1], capsys)
        folder, words = place(page), STORIES[page][i]
        made = {written(said) for said in STORIES[page]}
        for name, source in stand_ins.items():
            if mentioned(name, words) and name not in made and name not in laid[page]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
                laid[page].add(name)
        with contextlib.chdir(folder):
            capsys.readouterr()
            code = cli.main(smaller(words))
            done[page, i] = (code, *capsys.readouterr(), folder)
        return done[page, i]

    done = {}
    laid = {page: set() for page in STORIES}
    return tell


@pytest.mark.parametrize(("page", "i"), ALL)
def test_delve_command_runs(page, i, told, capsys):
    words = STORIES[page][i]
    code, out, err, folder = told(page, i, capsys)
    line = " ".join(words)
    assert code == 0, f"{page.name}: {line}: {err[-2000:]}"
    assert out.strip() and "already done" not in err, f"{page.name}: {line}"
    if dst := written(words):
        assert any((folder / dst).iterdir()) and not (folder / f"{dst}.partial").exists()
    if words[1:3] == ["delphi", "sweep"]:
        rows = list(csv.DictReader((folder / dst / "points.csv").open()))
        assert tuple(rows[0]) == sweep.COLUMNS
    if "--json" in words:
        json.loads(out)


# ---- the tables are true -------------------------------------------------------------------------


def test_every_line_of_the_tables_is_of_some_command(stand_ins):
    """Nothing stale: what is replaced or laid out stands on a page."""
    said = [STORIES[page][i] for page, i in (p.values for p in ALL)]
    lines = [" ".join(words) + " " for words in said]
    for pattern, _, _ in SMALLER:
        assert any(re.match(pattern, line) for line in lines), pattern
    for name in (*RENAMED, *TINY_PRESETS):
        assert any(name in line for line in lines), name
    for name in stand_ins:
        assert any(mentioned(name, words) for words in said), name


# ---- the others ----------------------------------------------------------------------------------


def shell(page: Path) -> list[str]:
    """Lines of the page's fences of shell that are no `delve` command."""
    lines = [
        line.removeprefix("$ ")
        for language, text in FENCE.findall(page.read_text())
        if language in ("", "console", "sh", "bash")
        for line in lines_of(text)
    ]
    return [line for line in lines if not line.startswith("delve ")]


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem) for p in PAGES if shell(p)])
def test_other_commands_are_run_where_the_table_says(page):
    for line in shell(page):
        found = [(m, row) for row in ELSEWHERE if (m := re.fullmatch(row[0], line))]
        assert len(found) == 1, f"docs: who runs `{line}` of {page.name}? name it in ELSEWHERE"
        ((match, (_, file, words)),) = found
        want = words.format("", *match.groups())
        assert want in (ROOT / file).read_text(), f"{page.name}: {line}: {file} has no `{want}`"


def test_tables_are_written_into_the_pages(tmp_path, monkeypatch):
    """`python experiments/tables.py` on copies, a line too many in each: the pages again."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import tables

    copies = [tmp_path / page.name for page in tables.PAGES]
    for page, copy in zip(tables.PAGES, copies, strict=True):
        copy.write_text(page.read_text().replace("-->\n", "-->\nstale\n", 1))
        assert copy.read_text() != page.read_text()
    pages = tables.PAGES
    monkeypatch.setattr(tables, "PAGES", copies)
    assert tables.main([]) == 0
    assert [c.read_text() for c in copies] == [page.read_text() for page in pages]


def test_nothing_in_that_table_is_stale():
    lines = [line for page in PAGES for line in shell(page)]
    for pattern, _, _ in ELSEWHERE:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


def test_what_is_not_run_here_runs_elsewhere():
    said = [" ".join(words) for story in STORIES.values() for words in story]
    excused = 0
    for line, (_, file, words) in EXCUSED.items():
        assert words in (ROOT / file).read_text(), file
        found = sum(bool(re.fullmatch(line, command)) for command in said)
        assert found, line
        excused += found
    assert len(ALL) + excused == len(said)
    # what `make quickstart` is
    assert "experiments/quickstart.py $(ARGS)" in (ROOT / "Makefile").read_text()
    script = (ROOT / "experiments" / "quickstart.py").read_text()
    assert 'cli.main(["upcycle", *flags])' in script and '"out" / "quickstart"' in script


def test_every_fenced_delve_line_is_in_a_story():
    """Counted in the raw pages: no fence, prompt or continuation hides one."""
    for page in PAGES:
        fenced = "".join(text for _, text in FENCE.findall(page.read_text()))
        raw = re.findall(r"^\s*(?:\$ )?(?:\w+=\S+ )*delve (?!jax)", fenced, re.M)
        assert len(raw) == len(STORIES.get(page, ())), page.name
