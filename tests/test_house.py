"""The rules of the house: which way imports point, what stays free of torch, and how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("losses", "towers", "joint")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAY_IMPORT = {
    "losses": {"losses", "torch"},
    "towers": {"towers", "torch", "torchrec"},
    "joint": {
        *("joint", "losses", "towers", "torch", "torchrec", "numpy", "pandas", "pyarrow", "omegaconf", "yaml"),
        *("fbgemm_gpu", "tqdm", "scipy", "matplotlib"),  # TorchRec brings tqdm; the last two are the extra [report]
        *("onnx", "onnxruntime", "faiss", "fastapi", "uvicorn"),  # extras [export], [serve] and [http]
    },
}
WITHOUT_TORCH = (
    "joint.schema",
    "joint.data.ragged",
    "joint.versions",
    "joint.configuring.settings",
    "joint.errors",
    "joint.data.columns",
    "joint.data.eligibility",
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[str]:
    """The packages that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield str(node.module).split(".")[0]


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))


def is_overload(node: ast.AST) -> bool:
    return any(getattr(decorator, "id", "") == "overload" for decorator in getattr(node, "decorator_list", []))


def test_there_is_something_to_check():
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)
    assert ROOT / "joint/training.py" in FILES


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file):
    allowed = MAY_IMPORT[file.relative_to(ROOT).parts[0]] | sys.stdlib_module_names
    assert sorted(set(imports(file)) - allowed) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_too_long(file):
    assert len(file.read_text().splitlines()) < LONGEST_FILE
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(file) if f.name != "train"}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_names_have_docstrings_and_signatures_types(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or is_overload(node), f"{node.name} has no docstring"
    for function in functions(file):
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}: {bare}"
        assert function.returns is not None, f"{function.name}: no return type"


def test_test_files_have_names_of_their_own():
    names = [file.name for file in TESTS if file.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_ids_settings_and_ragged_lists_do_without_torch():
    program = (
        f"import sys, importlib; sys.modules['torch'] = None; [importlib.import_module(m) for m in {WITHOUT_TORCH}]"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_starts_without_what_only_reports_and_readers_need():
    program = "import sys, joint.training, joint.fit;assert not sys.modules.keys() & {'pandas', 'scipy', 'matplotlib'}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
