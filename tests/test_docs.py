"""Every block of the documents runs here and prints what the page says; every link leads somewhere.

A ``python`` block runs after the blocks before it, and a ``text`` block is what the block above it prints: words and
whole numbers exactly, other numbers nearly. ``console`` blocks go through the command line and are compared without
their numbers. A block with a file name, as in ``toml ward.toml``, is that file.
"""

import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from idiolect import methods
from idiolect.cli import main as cli
from idiolect.core.card import card_of
from idiolect.data.sources import SOURCES
from idiolect.registry.names import SHIFTS, SPLITS, method_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
KNOWN = ("make", "pip", "git", "cd", "python docs/catalog.py")


class Block(NamedTuple):
    language: str
    file: str
    text: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], m[3], text[: m.start(3)].count("\n")) for m in found]


def page_id(page):
    return str(page.relative_to(ROOT))


def words(text):
    """Return a text without its numbers, and with one blank or one line where there are several."""
    return re.sub(r"([─═])+", r"\1", " ".join(NUMBER.sub("#", text).split())).replace("─ ", "─")


def assert_agree(printed, shown):
    assert words(printed) == words(shown), f"printed:\n{printed}"
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        nearly = "." in one and "." in other and float(one) == pytest.approx(float(other), rel=0.1, abs=0.1)
        assert one == other or nearly, f"printed:\n{printed}"


def run_python(block, names, page):
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return printed.getvalue()


def run_console(text):
    """Run the lines after ``$``; those that are not for idiolect are only known, not run."""
    for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = re.sub(r"\\\n\s*", "", session).partition("\n")
        if not line.startswith("idiolect "):
            assert line.startswith(KNOWN), line
            for target in re.findall(r"^make (\S+)", line):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), line
            continue
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = cli.main(shlex.split(line)[1:])
        refused = shown.startswith("idiolect: ") and "\n" not in shown.strip()
        assert code == (2 if refused else 0), printed.getvalue()
        if shown:
            assert words(printed.getvalue()) == words(shown), f"printed:\n{printed.getvalue()}"


@pytest.fixture
def own_modules(tmp_path):
    """Let the modules that a page writes go with it: another page may have some of the same name."""
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_what_a_page_shows_is_what_happens(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("IDIOLECT_DATA", raising=False)
    torch.set_num_threads(1)
    names, printed = {"__name__": "__page__"}, ""
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            assert not printed, f"line {block.line}: no text block shows what was printed before it:\n{printed}"
            printed = run_python(block, names, page)
        elif block.language == "text":
            assert_agree(printed, block.text)
            printed = ""
        elif block.language == "console":
            run_console(block.text)
        elif block.language == "sh":  # takes long: a command that the command line understands
            for line in block.text.splitlines():
                given = cli.parse(shlex.split(line)[1:])
                assert all(method_of(method) for method in getattr(given, "methods", ())), line
    assert not printed, f"no text block shows what was printed last:\n{printed}"


def anchors(page):
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.exists(), target
            assert not anchor or anchor in anchors(goal), target


def test_the_catalog_is_not_stale():
    written = runpy.run_path(str(ROOT / "docs" / "catalog.py"))
    for file, write in (("docs/methods.md", "catalog"), ("idiolect/methods/catalog.json", "entries")):
        assert (ROOT / file).read_text(encoding="utf-8") == written[write](), "run: make docs"


def test_the_pages_know_what_is_in_the_box():
    own_data, readme = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/own-data.md", "README.md"))
    assert [name for name in (*SOURCES, *SPLITS, *SHIFTS) if f"`{name}`" not in own_data] == []
    titles = [card_of(getattr(methods, name)).title for name in methods.__all__]
    assert [title for title in titles if not re.search(rf"\b{title}[,.]", readme)] == []


def test_the_readme_shows_the_demo_of_the_makefile():
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    demo = re.search(r"idiolect compare (.*?)\n\n", makefile, re.DOTALL)[1]
    command = " ".join(demo.replace("\\\n", " ").split())
    assert command in " ".join(readme.replace("\\\n", " ").split())


def test_a_page_that_is_wrong_is_noticed():
    assert_agree("accuracy 0.91 of 12\n", "accuracy  0.93 of 12")
    for printed, shown in (("a 0.91", "b 0.91"), ("a 0.91", "a 0.71"), ("a 12", "a 13"), ("a 12", "a 12 b")):
        with pytest.raises(AssertionError):
            assert_agree(printed, shown)
    with pytest.raises(AssertionError):
        run_console("$ idiolect methods --nonsense\n")
    with pytest.raises(AssertionError):
        run_console("$ make nonsense\n")
