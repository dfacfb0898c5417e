"""The rooms of the house import each other in one order, and importing any of them does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "cli": {"cli", "model"},
    "convert": {"convert", "cli", "model"},
    "infer": {"infer", "convert", "cli", "model"},
    "train": {"train", "infer", "convert", "cli", "model"},
}
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that any import statement under `tree` names."""
    absolute = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {module.split(".")[0] for module in absolute | plain}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_keep_the_order(path):
    room = path.relative_to(ROOT).parts[0]
    found = imported(ast.parse(path.read_text()))
    assert found & (MAY_IMPORT.keys() | {"tests", "benchmarks"}) <= MAY_IMPORT[room]
    assert "transformers" not in found


def ours(path: Path) -> set[str]:
    """The files of ours that `path` imports, inside functions too, by their modules' names."""
    files = {name(module): module for module in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in files else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & files.keys()


def test_no_file_imports_itself_by_way_of_others():
    """Imports inside functions and for type checkers count: they are hidden circles, not none."""
    imports = {name(path): ours(path) for path in MODULES}
    assert imports["convert.save"] >= {"convert.formats", "model.params"}  # that it sees any
    while imports:
        leaves = {module for module, needed in imports.items() if not needed & imports.keys()}
        assert leaves, f"these import each other in circles: {sorted(imports)}"
        imports = {module: needed for module, needed in imports.items() if module not in leaves}


def test_importing_everything_does_nothing():
    modules = [name(path) for path in MODULES if path.name != "__main__.py"]
    program = f"""
import importlib, os, sys
import jax  # sets variables of its own
before = dict(os.environ)
for module in {modules}:
    importlib.import_module(module)
assert dict(os.environ) == before, "the environment changed"
assert not {{"torch", "transformers"}} & sys.modules.keys(), "torch or transformers was imported"
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has started
assert jax.device_count() == 3
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_text_is_utf_8_whatever_the_locale():
    """Every text file is opened with its encoding said."""

    def is_text(call):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg for keyword in call.keywords}
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if name in ("read_text", "write_text"):
            return "encoding" not in given
        if name == "open" and ast.unparse(call.func).split(".")[0] not in ("os", "archive", "tensorstore"):
            return "encoding" not in given and not any("b" in mode for mode in modes if len(mode) < 4)
        return False

    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [f"{name(path)}:{call.lineno}" for call in calls if is_text(call)]
