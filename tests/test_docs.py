"""The pages say what is there: commands parse, scripts take the flags, links, files, tests exist.

Pages: README.md, CONTRIBUTING.md, docs/*.md. Nothing that a page says to run is run here but
Delphi's arithmetic and the Python that needs an embedded proxy alone.
"""

import ast
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import delve_jax
from delve_jax import cli
from delve_jax.delphi import verbs
from delve_jax.delphi.recipe import DELPHI, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "experiments" / "results", ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SCRIPT = re.compile(r"python3? (experiments/[\w/]+\.py)((?: [^`|\n]*)?)")
PATH = re.compile(r"(?<![\w./])(?:delve_jax|tests|experiments|docs)/[\w./*-]*")
NO_SHELL = ("python", "json", "csv", "toml", "yaml", "bibtex")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@functools.cache
def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fence."""
    return FENCE.findall(page.read_text())


@functools.cache
def spans(page: Path) -> list[str]:
    """Inline code outside of fences, in order; a line may end inside."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", page.read_text()))]


def lines_of(text: str) -> list[str]:
    """Shell lines, backslash continuations joined."""
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def commands(page: Path, start: str) -> list[list[str]]:
    """Words of the fenced commands of this program, without prompt, comment and variables."""
    out = []
    for language, text in fences(page):
        for line in lines_of(text) if language not in NO_SHELL else ():
            line = re.sub(r"^(\$ |(\w+=\S+ )+)", "", line)
            if line.startswith(start):
                out.append(shlex.split(line, comments=True))
    return out


# ---- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser():
    return cli.parser()


@pages
def test_fenced_delve_commands_parse(page, parser, capsys):
    for words in commands(page, "delve "):
        try:
            parser.parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {' '.join(words)}: {capsys.readouterr().err}")


def test_a_wrong_command_would_be_caught(parser, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```\nX=1 delve info \\\n   out/a --no-such-flag   # words\n```\n")
    (words,) = commands(page, "delve ")
    assert words == ["delve", "info", "out/a", "--no-such-flag"]
    with pytest.raises(SystemExit):
        parser.parse_args(words[1:])


def verbs_of(parser) -> dict:
    return next(a for a in parser._actions if a.dest == "verb").choices


@pages
def test_inline_delve_commands_name_verbs_and_flags(page, parser):
    known = verbs_of(parser)
    for span in spans(page):
        words = span.split()
        if words[0] == "delve" and len(words) > 1 and words[1].islower():
            assert words[1] in known, f"{page.name}: `{span}`"
            flags = re.findall(r"--[a-z][\w-]*", span)
            text = json.dumps([a.option_strings for a in actions(known[words[1]])])
            assert all(f'"{flag}"' in text for flag in flags), f"{page.name}: `{span}`"


def actions(parser) -> list:
    """All of a parser's, those of what stands below it too."""
    out = list(parser._actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            out += [a for sub in action.choices.values() for a in actions(sub)]
    return out


# ---- scripts -------------------------------------------------------------------------------------

PASS_ON = ("quickstart", "upcycle_04b", "upcycle_14b", "upcycle_7b")  # flags of `delve upcycle`


@functools.cache
def flags_of(script: Path) -> frozenset[str]:
    """Long flags that a script can take: add_argument's, or where it reads sys.argv, its words."""
    tree = ast.parse(script.read_text())
    found = {
        word.value
        for call in ast.walk(tree) if isinstance(call, ast.Call)
        for word in call.args
        if getattr(call.func, "attr", "") == "add_argument" and isinstance(word, ast.Constant)
    }  # fmt: skip
    if not found:
        found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    if "arguments(__doc__" in script.read_text():  # the flags that benchmarks share
        found |= flags_of(script.with_name("turns.py"))
    if "hybrid.flags(__doc__" in script.read_text():  # those of the hybrid studies
        found |= flags_of(script.with_name("hybrid.py"))
    if "sweep_flags(" in script.read_text() and script.stem != "mfu":  # and those of a sweep
        found |= flags_of(script.with_name("mfu.py"))
    if script.stem.startswith("upcycle_"):
        found |= flags_of(script.with_name("tiers.py"))
    if script.stem in PASS_ON:
        found |= {f for a in verbs_of(cli.parser())["upcycle"]._actions for f in a.option_strings}
    return frozenset(f for f in found if isinstance(f, str) and re.fullmatch(r"--[a-z][\w-]*", f))


def has_help(script: Path) -> bool:
    """Whether its flags are argparse's."""
    return ".parse_args(" in script.read_text()


@pages
def test_scripts_exist_and_take_the_flags(page):
    shell = "\n".join(text for language, text in fences(page) if language not in NO_SHELL)
    texts = [*lines_of(shell), *spans(page)]
    for name, rest in (found for text in texts for found in SCRIPT.findall(text)):
        assert (ROOT / name).is_file(), f"{page.name}: {name}"
        flags = re.findall(r"(?<!\S)--[a-z][\w-]*", rest.partition(" #")[0])
        unknown = set(flags) - flags_of(ROOT / name)
        assert not unknown, f"{page.name}: python {name}{rest}: no {unknown}"


def scripts() -> list[Path]:
    return [
        p for folder in ("", "benchmarks") for p in (ROOT / "experiments" / folder).glob("*.py")
    ]


def test_scripts_without_help_are_named():
    """docs/reproduce.md says which scripts have no --help, and explains every one."""
    text = (DOCS / "reproduce.md").read_text()
    named = re.search(r"No `--help`:(.*?)\.\n\n", text, re.S)[1]
    bare = {p.name for p in scripts() if not has_help(p)}
    assert set(SPAN.findall(named)) == bare
    missing = [p.name for p in scripts() if p.name not in text]
    assert not missing, f"docs/reproduce.md does not say what {missing} are for"


# ---- links, files, tests -------------------------------------------------------------------------


@pages
def test_links_and_images_exist(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@pages
def test_inline_paths_exist(page):
    for span in spans(page):
        for path in (found.rstrip(".") for found in PATH.findall(span)):
            if re.search(r"/[A-Z]{2,}\b", path):  # a placeholder, as NAME
                continue
            assert list(ROOT.glob(path)), f"{page.name}: `{path}`"


@pages
def test_named_tests_exist(page):
    """`tests/test_x.py` (`test_a`, ...): each stands in the file named before it."""
    file = None
    for span in spans(page):
        if re.fullmatch(r"tests/test_\w+\.py", span):
            file = ROOT / span
        elif re.fullmatch(r"test_\w+", span):
            assert file is not None, f"{page.name}: `{span}` without a file before it"
            assert f"def {span}(" in file.read_text(), (
                f"{page.name}: `{span}` is not in {file.name}"
            )


@pages
def test_lines_of_a_table_have_its_columns(page):
    """An unescaped | in a cell moves all that follows."""
    for block in re.findall(r"(?:^\|.*\|\n)+", FENCE.sub("", page.read_text()), re.M):
        counts = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        assert len(set(counts)) == 1, f"{page.name}: {block.splitlines()[0]}: {counts}"


# ---- results -------------------------------------------------------------------------------------


def test_every_table_and_result_is_explained():
    text = (DOCS / "reproduce.md").read_text()
    tables, without_table, without = re.split(
        r"^## (?:Results without a table|Studies without results)$", text, flags=re.M
    )
    shown = (ROOT / "README.md").read_text() + (DOCS / "results.md").read_text()
    markers = set(re.findall(r"<!-- (\w+) -->", shown))
    assert set(re.findall(r"^\| `(\w+)` \|", tables, re.M)) == markers
    told = re.findall(r"`([\w*]+\.(?:json|png))`", tables + without_table)
    missing = [p.name for p in RESULTS.iterdir() if not any(p.match(name) for name in told)]
    assert not missing, f"docs/reproduce.md: {missing}"
    gone = [name for name in told if not list(RESULTS.glob(name))]
    assert not gone, f"docs/reproduce.md: {gone} are not in experiments/results"
    made = [n for n in re.findall(r"^\| `(\w+\.json)`", without, re.M) if (RESULTS / n).exists()]
    assert not made, f"docs/reproduce.md: {made} have results now; move them up"


@pages
def test_what_has_no_result_yet_has_none(page):
    for sentence in re.split(r"[.:] ", " ".join(page.read_text().split())):
        if "no result yet" in sentence:
            for name in re.findall(r"experiments/(\w+)\.py", sentence):
                assert not (RESULTS / f"{name}.json").exists(), f"{page.name}: {sentence}"


def result(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


QUOTED = {  # page -> what it quotes of the committed results
    "faq.md": lambda: [
        *(f"{row['ratio']:.2f}" for row in result("memory")["rows"]),
        f"{result('compress_memory')['rows'][0]['peak_rss'] / 2**30:.1f} GiB",
        f"{pool_gain('fitted pool'):.4f} on the dense",
        f"{-pool_gain('even pool'):.3f} nats",
    ],
    "architecture.md": lambda: [
        f"{result('bars')[f'step 0, J={j}']['max_abs_dlogp']:.1e}".replace("e-0", "e-")
        for j in ("1", "K")
    ],
    "results.md": lambda: [
        f"{gap['codes']:.3f} nats [{gap['low']:.3f}, {gap['high']:.3f}] ahead of factored"
        for gap in [ahead()]
    ] + [f"{result('hybrid_codes')['difference'][f'common 1/4 - own{end}']['mean']:.3f} {after}"
         for end, after in (("", "nats are left"), (", longer", "after four times"))],
    "delphi.md": lambda: [
        *(f"{100 * s['mean_abs_error']:.1f}" for s in downstream()),
        *(f"{s['covered']} of {s['forecasts']}" for s in downstream()),
        *(f"{c['error']:.2%}".replace("-", "−").replace("%", " %")
          for c in (result("ladder")["comparison"], result("ladder")["far"]["comparison"])),
    ],
}  # fmt: skip


def ahead() -> dict:
    """Nats a token by which codes in common are better than factored tables, both healed."""
    d = result("hybrid_codes")["difference"]["common 1/4 - own 1/4"]
    return {"codes": -d["mean"], "low": -d["high"], "high": -d["low"]}


def downstream() -> list[dict]:
    return list(result("delphi_downstream")["summary"].values())


def pool_gain(name: str) -> float:
    """Nats a token that a pool of the dense parents gains over the best of them."""
    r = result("hybrid_diversity")
    return min(r["nll"][n] for n in r["names"]) - r["nll"][name]


@pytest.mark.parametrize("name", QUOTED)
def test_quoted_numbers_are_those_of_the_results(name):
    text = " ".join((DOCS / name).read_text().split())
    for number in QUOTED[name]():
        assert number in text, f"docs/{name}: {number} is not there"


# ---- Delphi --------------------------------------------------------------------------------------


def test_delphi_prints_what_the_page_shows():
    """Each `text` fence against the command of the fence before it (the forecast: its result)."""
    shown = fences(DOCS / "delphi.md")
    compared = 0
    for (_, command), (language, text) in zip(shown, shown[1:], strict=False):
        if language != "text":
            continue
        args = vars(cli.parser().parse_args(shlex.split(command)[1:]))
        if args["action"] == "forecast":  # its points are not part of the repository
            made = verbs.show({k: result("delphi")[k] for k in ("fit", "forecasts")})
        else:
            made = verbs.show(verbs.run(**{k: args[k] for k in args if k not in ("verb", "json")}))
        lines = [line.rstrip() for line in made.splitlines()]
        for line in text.splitlines():
            assert line.rstrip() in lines, f"docs/delphi.md: {line}"
        compared += 1
    assert compared == 3


def test_delphi_formulas_have_the_recipes_constants(tmp_path):
    text = " ".join((DOCS / "delphi.md").read_text().split())
    for value in (
        f"{DELPHI.lr0:g}", f"{DELPHI.adam_lr0:g}", "1.85e-8", f"{DELPHI.beta2_0:g}",
        f"S = {DELPHI.seq_len}", f"{DELPHI.vocab_size:,}", f"round(H / ({DELPHI.depth_base} +",
        f"{DELPHI.max_steps:,} S", f"√(B/{DELPHI.B0})", f"^{DELPHI.lr_exponent:g})",
        f"{DELPHI.max_tokens_per_param:g} tokens a parameter",
        f"forward {DELPHI.forward_flops(512):,}",
        f"T* = {DELPHI.token_coefficient:.6g} C^{DELPHI.token_exponent:.6f}",
        f"min({DELPHI.max_lr:g},", f"{DELPHI.max_grad_norm:g}, of the AdamH group",
        f"H from {DELPHI.min_hidden} by {DELPHI.fine_step} (by {DELPHI.coarse_step} above",
    ):  # fmt: skip
        assert value in text, f"docs/delphi.md: {value}"
    T = DELPHI.target_tokens(3e18, 512)
    assert f"= {T / (DELPHI.max_steps * DELPHI.seq_len):.2f}, so B = {DELPHI.batch(T)}" in text
    (constants,) = (t for language, t in fences(DOCS / "delphi.md") if language == "json")
    file = tmp_path / "recipe.json"
    file.write_text(constants)
    assert read(file).lr0 == json.loads(constants)["lr0"]


# ---- Python --------------------------------------------------------------------------------------


def excerpt(text: str) -> bool:
    """Whether a fence stands word for word in a file of docs/examples (which has its own tests)."""
    return any(text.strip("\n") in file.read_text() for file in DOCS.glob("examples/*.py"))


def needs(text: str) -> bool:
    """Whether a fence says on its first line that it needs more, or reads what a run has left."""
    return text.lstrip().startswith("# needs") or '"out/' in text


PYTHON = [
    pytest.param(text, id=f"{page.name}-{i}")
    for page in PAGES
    for i, (language, text) in enumerate(fences(page))
    if language == "python" and not excerpt(text)
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_fences_name_what_exists(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("delve_jax"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "delve_jax":
            known = node.attr in delve_jax.__all__
            assert known or importlib.util.find_spec(f"delve_jax.{node.attr}"), node.attr


@pytest.mark.parametrize("text", [p for p in PYTHON if not needs(p.values[0])])
def test_python_fences_that_need_a_proxy_alone_run(text):
    exec(compile(text, "fence", "exec"), {"__name__": "fence"})


def test_some_python_is_run():
    assert any(not needs(p.values[0]) for p in PYTHON)


# ---- the picture ---------------------------------------------------------------------------------


def test_the_picture_is_drawn_in_the_size_of_the_one_committed(tmp_path, monkeypatch):
    import matplotlib.image

    monkeypatch.syspath_prepend(ROOT / "experiments")
    architecture = importlib.import_module("architecture")
    architecture.draw(tmp_path / "new.png")
    new, old = (matplotlib.image.imread(p) for p in (tmp_path / "new.png", architecture.OUT))
    assert new.shape == old.shape and new[..., :3].mean() == pytest.approx(
        old[..., :3].mean(), abs=0.01
    )
