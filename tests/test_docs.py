"""README.md, docs and the notes on GPUs: what they name exists, and their tables are those that the benchmarks wrote."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.tables import MARKED, ROOT, TABLES, include, pages

PAGES = [*pages(), *sorted((ROOT / "benchmarks").glob("*.md"))]
SCRIPTS = (
    "train", "sample", "evaluate", "models.pipeline", "benchmarks.quality", "benchmarks.initialisation", "benchmarks.classifier",
    "benchmarks.faults", "benchmarks.bench kernels", "benchmarks.bench model", "benchmarks.bench costs", "benchmarks.bench train",
    "benchmarks.bench attention", "benchmarks.ablate",
)  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OURS = {path.stem if path.suffix == ".py" else path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_of(page: Path) -> list[str]:
    """What a page shows as code: spans between backticks, and lines of blocks, continued lines joined."""
    text = re.sub(r"\\\n\s+", "", page.read_text())
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) + re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """(module, arguments) of each command of ours: ("train", ["--steps", "0"]), ("benchmarks.bench", ["costs"])."""
    found = []
    for code in code_of(page):
        for module, script, rest in re.findall(r"\b(?:python|torchrun .*?) ?(?:-m ([\w.]+)|([\w/]+)\.py)([^|&>#]*)", code):
            if module != "pytest":
                found.append((module or script.replace("/", "."), shlex.split(rest)))
    return found


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags in the --help of a script, "benchmarks.bench kernels" or "train". Its docstring does not count."""
    name, *command = script.split()
    main, printed = importlib.import_module(name).main, io.StringIO()
    argv = [*command, "--help"]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        main(argv) if inspect.signature(main).parameters else main()
    return set(FLAG.findall(printed.getvalue().split("options:")[1]))


def slugs_of(page: Path) -> set[str]:
    """The anchors that headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_file_that_a_page_names_exists(page):
    """Catches a file that was renamed or never committed."""
    words = [word.strip("\"'(),:;") for code in code_of(page) for word in code.split()]
    names = {word for word in words if re.fullmatch(r"[\w.*/-]+\.(py|cpp|md|txt)|(assets|backends|docs|tests)/[\w./-]+", word)}
    names = {name for name in names if not re.search(r"[A-Z]{4,}\.|\*", name)}  # NAME.txt, FILE.py
    assert not [name for name in names if not (ROOT / name).exists() and not (page.parent / name).exists()]


@every_page
def test_every_command_that_a_page_names_has_its_flags(page):
    """Catches a script that moved, a flag that was renamed or is gone, and a flag that belongs to another script."""
    for module, arguments in commands_of(page):
        assert importlib.util.find_spec(module), f"no module {module}"
        script = " ".join([module, *[a for a in arguments[:1] if module == "benchmarks.bench"]])
        if given := {a for a in arguments if FLAG.fullmatch(a)}:
            assert not given - flags_of(script), f"python {script} has no such flag"


@every_page
def test_every_flag_that_a_page_names_is_a_flag_of_some_script(page):
    """Catches a flag that was renamed or is gone, where no command stands beside it."""
    known = {"--nproc-per-node", "--repo-type", "--local-dir"}.union(*map(flags_of, SCRIPTS))
    assert not {flag for code in code_of(page) for flag in FLAG.findall(code)} - known


@every_page
def test_every_name_in_the_code_that_a_page_mentions_exists(page):
    """Catches a function or table that was renamed: `quant.ROUNDINGS`, `models.pipeline.load_pipeline(..)`."""
    for code in code_of(page):
        name = re.match(r"(?:\w+\.)*\w+", code)
        if name and name[0].split(".")[0] in OURS and not name[0].endswith((".py", ".cpp", ".md")):
            pkgutil.resolve_name(name[0])


@every_page
def test_every_link_of_a_page_leads_somewhere(page):
    """Catches a page, a file or a heading that was renamed."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in slugs_of(target), link


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_those_of_the_benchmarks(page):
    """Catches a number that was typed or is left from an earlier run, and a pattern that finds no row any more."""
    text = page.read_text()
    assert include(text) == text, "run: python -m benchmarks.tables"
    for found in MARKED.finditer(text):
        assert found[0].count("\n|") >= 3, found[1]
        assert page.name != "README.md" or found[0].count("\n|") <= 2 + 8


def test_a_number_that_was_typed_is_replaced():
    """Catches an include that changes nothing, or more than what is between its markers."""
    text = (ROOT / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| tiny | fp CM | 4 |"))
    assert include(text.replace(row, "| tiny | fp CM | 4 | 1.0 | 1.000 | 1.000 | - | 1 |\n| typed |")) == text


def test_every_table_is_shown():
    """Catches a benchmark whose table no page has."""
    shown = {name for page in pages() for found in MARKED.finditer(page.read_text()) for name in found[2].split()}
    assert shown == {file.stem for file in TABLES.glob("*.md")}


@pytest.mark.parametrize("file", sorted((ROOT / "assets").glob("tiny*.safetensors")), ids=lambda file: file.name)
def test_scores_of_shipped_weights_are_those_in_their_metadata(file):
    """Catches a score that was typed wrongly, and weights that were made again without the page."""
    with safe_open(file, "pt") as opened:
        scores = json.loads(opened.metadata()["info"])["scores"].values()
    (row,) = [line for line in (ROOT / "docs/results.md").read_text().splitlines() if line.startswith(f"| `assets/{file.name}`")]
    written = re.findall(r"[\d.]+ / [\d.]+", row)
    assert len(written) >= 2 and set(written) <= {f"{s['frechet']:.1f} / {s['prompt_accuracy']:.3f}" for s in scores}


def test_the_readme_is_short():
    """Catches a README that becomes a manual again: what is longer belongs to docs."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 260
