"""The structure of the package: imports go one way, and no function or module grows too large."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import REPOSITORY

PACKAGE = REPOSITORY / "privimage"
# From the lowest to the highest. A module imports from its own package and from lower layers only; packages
# of one layer do not know each other.
LAYERS = (
    {"errors", "torchvision_operators"},
    {"config"},
    {"storage", "telemetry"},
    {"distributed", "models"},
    {"data", "evaluation"},
    {"privacy"},
    {"families"},
    {"recipes"},
    {"releases"},
    {"stages"},
    {"runs"},
    {"experiments"},
    {"cluster"},
    {"commands"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
FUNCTION_LINES, MODULE_LINES = 50, 300


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """The packages of privimage that a module imports from, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "privimage":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("privimage."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("privimage.")
            )


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = name_of(path)
    wrong = {other for other in imports(parsed(path)) if other != own and LAYER[other] >= LAYER[own]}
    assert not wrong, f"{path.relative_to(REPOSITORY)} imports from {', '.join(sorted(wrong))}"


def test_stages_do_not_import_each_other() -> None:
    """What they share is in modules that are no stages."""
    names = {path.stem for path in (PACKAGE / "stages").glob("*.py") if defines_run(path)}
    for path in (PACKAGE / "stages").glob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("privimage.stages."):
                assert str(node.module).split(".")[2] not in names, path


def defines_run(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in parsed(path).body)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_and_modules_fit_in_a_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MODULE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path.name}: {node.name}"
