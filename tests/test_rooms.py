"""The contract of the rooms that lint-imports cannot state."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pusht_act"


def test_each_room_imports_lerobot_in_one_module_at_most() -> None:
    """So that the next LeRobot is read against a handful of files."""
    importers: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.partition(".")[0] == "lerobot" for module in modules):
                importers[path.relative_to(PACKAGE).parts[0]].add(path.name)
    assert "config" in importers
    assert {room: names for room, names in importers.items() if len(names) > 1} == {}


def test_each_room_says_what_it_is_and_exports_nothing() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_functions_and_files_stay_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
