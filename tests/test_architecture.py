"""The shape of the source: imports point up the list of layers, and files stay readable.

The rules are functions over any tree, so that the second half can show each of them failing on a
small bad tree. The last part asks fresh interpreters what a plain import loads.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "visae"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
LAYERS = (
    "errors",
    "progress",
    "distributed",
    "storage",
    "statistics",
    "images",
    "models",
    "activations",
    "saes",
    "training",
    "evaluation",
    "features",
    "comparison",
    "interventions",
    "reports",
    "web",
    "demo",
    "cli",
)
MAX_LINES = 450
DRAWER_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
HEAVY = ("torch", "torchvision", "timm", "pyarrow", "scipy", "sklearn", "skimage", "matplotlib")


class Import(NamedTuple):
    """One import of a module of this package, wherever it stands in the file."""

    target: str
    line: int
    runs_on_import: bool


# The rules


def modules(source: Path) -> dict[str, Path]:
    """Every module below the package's folder, by its dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    """Every import of this package in a module, with the module that it loads."""
    for node, runs_on_import in walk(ast.parse(path.read_text(encoding="utf-8")), True):
        for target in targets(node, name, path, known):
            if target == PACKAGE or target.startswith(f"{PACKAGE}."):
                yield Import(target, node.lineno, runs_on_import)


def walk(node: ast.AST, runs_on_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, with whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            deferred = True
        yield child, runs_on_import
        yield from walk(child, runs_on_import and not deferred)


def targets(node: ast.AST, name: str, path: Path, known: set[str]) -> list[str]:
    """The modules that one statement loads, or none if it is no import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node, name, path)
        inner = [f"{base}.{alias.name}" for alias in node.names]
        return [module if module in known else base for module in inner]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        return [text for text in texts if isinstance(text, str)]
    return []


def absolute(node: ast.ImportFrom, name: str, path: Path) -> str:
    """The module after ``from``, with the dots of a relative import resolved."""
    parents = name.split(".")
    n_up = node.level - (path.name == "__init__.py")
    base = parents[: len(parents) - n_up] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def layer(module: str) -> int:
    """Position in the list; the package itself comes before all, and may be imported by all."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return LAYERS.index("cli" if parts[1] == "__main__" else parts[1])


def unknown_layers(source: Path) -> list[str]:
    return [
        f"{name}: {name.split('.')[1]} is not in the list of layers"
        for name in modules(source)
        if name != PACKAGE and name.split(".")[1] not in (*LAYERS, "__main__")
    ]


def imports_down_the_list(source: Path) -> list[str]:
    known = modules(source)
    return [
        f"{name}:{found.line} imports {found.target}, which stands further down the list"
        for name, path in known.items()
        if name != PACKAGE  # the package's own face names everything, and loads it when used
        for found in imports(name, path, set(known))
        if layer(found.target) > layer(name)
    ]


def cycles(source: Path) -> list[str]:
    known = modules(source)
    graph = {
        name: {
            found.target
            for found in imports(name, path, set(known))
            if found.runs_on_import and found.target != name
        }
        for name, path in known.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as cycle:
        return [" imports ".join(reversed(cycle.args[1]))]
    return []


def drawer_names(source: Path) -> list[str]:
    """Modules that are named after no idea, such as ``utils`` or ``image_helpers``."""
    return [
        name
        for name in modules(source)
        if DRAWER_NAMES & {part.split("_")[-1] for part in name.lower().split(".")}
    ]


def long_files(source: Path) -> list[str]:
    counts = {name: path.read_text().count("\n") for name, path in modules(source).items()}
    return [f"{name}: {count} lines" for name, count in counts.items() if count > MAX_LINES]


def undocumented(source: Path) -> list[str]:
    return [
        name
        for name, path in modules(source).items()
        if is_public(name) and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]


def is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split("."))


def bad_exports(source: Path) -> list[str]:
    """Public modules whose ``__all__`` is missing, incomplete or not sorted."""
    problems = []
    for name, path in modules(source).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = public_definitions(tree)
        exported = exported_names(tree)
        if not is_public(name) or (not public and exported is None):
            continue
        if exported is None:
            problems.append(f"{name} has no __all__")
        elif missing := public - set(exported):
            problems.append(f"{name}: {', '.join(sorted(missing))} not in __all__")
        elif exported != sorted(exported, key=export_order):
            problems.append(f"{name}: __all__ is not sorted")
    return problems


def public_definitions(tree: ast.Module) -> set[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = {node.name for node in tree.body if isinstance(node, kinds)}
    return {name for name in names if not name.startswith("_")}


def exported_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def export_order(name: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Constants, then classes, then functions, numbers by their value: the linter's order."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    parts = re.findall(r"\d+|\D+", name)
    return kind, [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


RULES = (
    unknown_layers,
    imports_down_the_list,
    cycles,
    drawer_names,
    long_files,
    undocumented,
    bad_exports,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps(rule):
    assert rule(SOURCE) == []


# The rules themselves, seen to fail


@pytest.fixture
def tree(tmp_path):
    """Write a package from file names and contents; gives its folder."""

    def write(**files: str) -> Path:
        source = tmp_path / PACKAGE
        for name, text in {"__init__": '"""Top."""\n', **files}.items():
            path = source.joinpath(*name.split("/")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source

    return write


GOOD_MODULE = '''"""Doc."""

from visae.errors import Box

__all__ = ["Box", "a"]


def a():
    from .. import saes
'''


def test_a_good_tree_passes_every_rule(tree):
    source = tree(
        **{
            "errors": '"""Doc."""\n\n__all__ = ["Box"]\n\n\nclass Box: ...\n',
            "saes/__init__": '"""Doc."""\n',
            "saes/sae": GOOD_MODULE,
            "web/app": GOOD_MODULE,
            "web/__init__": '"""Doc."""\n',
            "__main__": '"""Doc."""\nfrom visae.web.app import a\n',
        }
    )
    assert {rule: rule(source) for rule in RULES} == {rule: [] for rule in RULES}


@pytest.mark.parametrize(
    "text",
    [
        "import visae.web.app",
        "from visae.web import app",
        "from visae.web.app import a",
        "from ..web.app import a",
        "from .. import web",
        "def a():\n    from visae.web import app",
        "if TYPE_CHECKING:\n    from visae.web import app",
        "class A:\n    async def a(self):\n        import visae.web",
        "try:\n    pass\nfinally:\n    import visae.web",
        "importlib.import_module('visae.web.app')",
    ],
)
def test_an_import_down_the_list_is_found(tree, text):
    source = tree(**{"saes/__init__": "", "saes/sae": text, "web/__init__": "", "web/app": ""})
    (problem,) = imports_down_the_list(source)
    n_lines = text.count("\n") + 1
    assert problem.startswith(f"visae.saes.sae:{n_lines} imports visae.web")


def test_an_import_within_a_relative_package_is_resolved(tree):
    source = tree(**{"web/__init__": "from . import app\nfrom ..demo import run", "web/app": ""})
    (problem,) = imports_down_the_list(source)
    assert "visae.web:2 imports visae.demo" in problem


def test_a_folder_outside_the_list_is_found(tree):
    assert unknown_layers(tree(**{"plugins/a": ""})) == [
        "visae.plugins.a: plugins is not in the list of layers"
    ]


@pytest.mark.parametrize(
    ("first", "second", "is_cycle"),
    [
        ("import visae.saes.b", "from visae.saes import a", True),
        ("from visae.saes.b import B", "from visae.saes.a import A", True),
        ("from .b import B", "from . import a", True),
        ("try:\n    from .b import B\nfinally:\n    pass", "class B:\n    from . import a", True),
        ("from .b import B", "def b():\n    from . import a", False),
        ("from .b import B", "if TYPE_CHECKING:\n    from . import a", False),
        ("from .b import B", "import torch", False),
    ],
)
def test_a_cycle_is_found(tree, first, second, is_cycle):
    source = tree(**{"saes/__init__": "", "saes/a": first, "saes/b": second})
    assert bool(cycles(source)) == is_cycle


def test_a_cycle_through_a_package_is_told_in_order(tree):
    source = tree(**{"saes/__init__": "from visae.saes.a import A", "saes/a": "from . import C"})
    assert cycles(source)[0] in (
        "visae.saes imports visae.saes.a imports visae.saes",
        "visae.saes.a imports visae.saes imports visae.saes.a",
    )


@pytest.mark.parametrize("name", ["saes/utils", "saes/_helpers", "common/a", "misc", "saes/x_util"])
def test_a_module_named_after_nothing_is_found(tree, name):
    assert len(drawer_names(tree(**{name: "", "saes/utility_maps": ""}))) == 1


def test_a_long_file_is_found(tree):
    source = tree(**{"errors": "\n" * MAX_LINES, "demo/run": "\n" * (MAX_LINES + 1)})
    assert long_files(source) == [f"visae.demo.run: {MAX_LINES + 1} lines"]


def test_a_module_without_a_docstring_is_found(tree):
    source = tree(**{"errors": "a = 1", "saes/__init__": "", "saes/_inner": "", "web/_a/b": ""})
    assert undocumented(source) == ["visae.errors", "visae.saes"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def a(): ...", "has no __all__"),
        ("__all__ = ['b', 'a']", "not sorted"),
        ("__all__ = ['a', 'B']", "not sorted"),
        ("__all__ = ['Apple', 'B_CONSTANT']", "not sorted"),
        ("__all__ = ['a10', 'a2']", "not sorted"),
        ("__all__ = ['a']\nclass B: ...", "B not in __all__"),
        ("__all__ = ['B_CONSTANT', 'Apple', 'a2', 'a10', 'b']", None),
        ("__all__ = []\ndef _a(): ...", None),
        ("X = 1", None),
    ],
)
def test_bad_exports_are_found(tree, text, said):
    problems = bad_exports(tree(errors=text, _private="def a(): ..."))
    assert len(problems) == (said is not None)
    assert all(said in problem for problem in problems)


# What a fresh interpreter loads

REPORT = f"import sys; print('loaded', *(set({HEAVY}) & set(sys.modules)))"


def loaded_by(code: str) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after running some code."""
    command = [sys.executable, "-c", f"{code}\n{REPORT}"]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-1].split()[1:]


def test_a_heavy_import_would_be_seen():
    assert "timm" in loaded_by("import sys; sys.modules['timm'] = sys")


@pytest.mark.parametrize("module", ["visae", "visae.errors", "visae.models.config"])
def test_an_import_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") == []


def test_help_loads_nothing_heavy():
    assert (
        loaded_by(
            "from visae.cli import main\n"
            "try:\n    code = main(['--help'])\n"
            "except SystemExit as end:\n    code = end.code\n"
            "if code:\n    raise SystemExit(code)"
        )
        == []
    )
