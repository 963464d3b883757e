"""The rules of the house, as far as a program can look after them."""

import ast
import inspect
import re
import statistics
import tomllib
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from mutants import MUTANTS
from test_methods import CATALOG

from idiolect import Method, methods, parts, scope
from idiolect.core.card import Card, card_of

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "idiolect").rglob("*.py"))
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE}
TREES = {file: ast.parse(text) for file, text in SOURCES.items()}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torchvision", "timm"}
NEVER_CALLED = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "eval", "exec", "pickle.loads"}


def test_imports_go_down(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None, no_cache=True) == 0, "run lint-imports to see which import goes up"


def test_files_are_small():
    lines = {file: text.count("\n") for file, text in SOURCES.items()}
    tests = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert {file: n for file, n in (lines | tests).items() if n > 400} == {}
    assert statistics.median(n for file, n in lines.items() if not file.endswith("__init__.py")) <= 150


def test_functions_fit_a_screen():
    """At most sixty lines without the docstring."""
    long = {}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if (length := node.end_lineno - first.lineno + 1) > 60:
                    long[f"{file}: {node.name}"] = length
    assert long == {}


def forbidden(tree, testing=False):
    """Return what a module imports or calls that could run code from a file, or needs torchvision."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] in NEVER_IMPORTED}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if (node.module or "").partition(".")[0] in NEVER_IMPORTED else set()
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= {called} if called in NEVER_CALLED and not (testing and called == "eval") else set()
            found |= {
                "allow_pickle" for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"
            }
    return found


def test_nothing_runs_code_from_a_file():
    assert {file: bad for file, tree in TREES.items() if (bad := forbidden(tree, "/testing/" in file))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torchvision.models import vgg",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(s)",
    ],
)
def test_what_is_forbidden_is_found(line):
    assert forbidden(ast.parse(line))


def submodules(file):
    """Return the names of the modules and packages in the folder of an `__init__`."""
    folder = file.removesuffix("__init__.py")
    inside = {other.removeprefix(folder) for other in SOURCES if other.startswith(folder) and other != file}
    return {path.partition("/")[0].removesuffix(".py") for path in inside}


def bound(tree):
    """Return the names that a module binds to something else than a module of its own package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and not f"{node.module}".endswith(".core") and node.module != "idiolect":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


PACKAGES = [file for file in TREES if file.endswith("__init__.py")]


@pytest.mark.parametrize("file", PACKAGES)
def test_a_package_exports_nothing_by_the_name_of_a_module(file):
    """Else `import idiolect.x as x` would give a function, or not, by what was imported before."""
    assert bound(TREES[file]) & submodules(file) == set()


def test_a_module_is_what_its_name_gives():
    absent = "idiolect/flower/ray/pool" if find_spec("flwr") else "idiolect/flower/"
    for file in (file for file in SOURCES if not file.startswith(absent) and not file.endswith("__main__.py")):
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module, (parent, _, leaf) = import_module(name), name.rpartition(".")
        assert not parent or getattr(import_module(parent), leaf) is module, name


def documented(tree):
    """Return the names that a module defines at the top level, and whether each has a docstring."""
    found = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) is not None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and str(after.value.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = bool(text)
    return found


def public():
    """Return every module with `__all__`, by its name."""
    files = [file for file, tree in TREES.items() if "__all__" in documented(tree)]
    modules = [import_module(f.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) for f in files]
    return {module.__name__: module for module in modules}


def test_public_names_are_sorted_and_there():
    """Constants, then classes, then the rest: the order of ruff."""
    for name, module in public().items():
        assert module.__all__ == sorted(module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)), name
        assert all(hasattr(module, exported) for exported in module.__all__), name


def test_public_names_are_documented():
    known = {}
    for tree in TREES.values():
        for name, said in documented(tree).items():
            known[name] = known.get(name, False) or said
    exported = {name for module in public().values() for name in module.__all__}
    exported |= {name for name, found in vars(scope).items() if isinstance(found, scope.Scope)}
    modules = {path.stem for path in PACKAGE} | {path.parent.name for path in PACKAGE}
    assert {name for name in exported - modules if not known.get(name)} == set()


def test_docstrings_name_all_arguments_and_no_others():
    wrong = {}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            doc = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if doc and "\nArgs:\n" in doc:
                section = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
                said = set(re.findall(r"^    (\w+): ", section, re.MULTILINE))
                rest = {a.arg for a in (node.args.vararg, node.args.kwarg) if a}
                named = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
                if not named <= said <= named | rest:
                    wrong[f"{file}: {node.name}"] = said ^ named
    assert wrong == {}


@pytest.mark.parametrize("name", methods.__all__)
def test_a_method_enters_with_all_that_is_asked(name):
    make = getattr(methods, name)
    card, made = card_of(make), make()
    assert isinstance(card, Card)
    assert isinstance(made, Method)
    assert card.title == made.name
    assert card.reference
    assert made.name in {method.name for method in CATALOG}, "it is not in tests/test_methods.py"
    oracle = "".join(path.read_text() for path in ROOT.glob("tests/test_*oracles*.py"))
    assert re.search(rf"methods\.{name}\b", oracle), "no test compares it with an oracle"
    if inspect.signature(make).parameters:
        assert "\nArgs:\n" in inspect.getdoc(make)


@pytest.mark.parametrize("name", parts.__all__)
def test_a_part_says_what_it_keeps_sends_and_costs(name):
    make = getattr(parts, name)
    said = set(re.findall(r"(?:^|  )([A-Z]\w+):", inspect.getdoc(make), re.MULTILINE))
    assert {"Memory", "Sends", "Cost", "Example", "Reference"} <= said
    if inspect.signature(make).parameters:
        assert {"Args", "Raises"} <= said


def test_every_part_has_a_planted_bug():
    files = {Path(inspect.getsourcefile(inspect.unwrap(getattr(parts, name)))).name for name in parts.__all__}
    assert {f"parts/{file}" for file in files} <= {mutant.file for mutant in MUTANTS}


def test_one_version():
    newest = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert (
        newest
        == cited
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        == version("idiolect")
    )


def test_nothing_is_left_to_do():
    mark = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("tests/*.py"), *PACKAGE, ROOT / "Makefile"]
    assert [path.name for path in pages if path.is_file() and mark.search(path.read_text(encoding="utf-8"))] == []
