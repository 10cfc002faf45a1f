"""The shape of the project: which layer may import which, what an import costs, what is packaged."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import onnxc
import pytest

ROOT = Path(onnxc.__file__).parent
LAYERS = ("ir", "passes", "backends", "compiler", "tools")
"""Each may import itself and those before it."""
LONGEST_FILE = 600


def modules() -> Iterator[tuple[tuple[str, ...], Path]]:
    """Every module of the package as the names on its path, with its file."""
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            yield path.relative_to(ROOT).with_suffix("").parts, path


def imports(names: tuple[str, ...], path: Path) -> Iterator[tuple[int, str]]:
    """(line, layer) of everything of the project that a module imports, in its functions too."""
    package = names[:-1]  # an __init__ module has its own name at the end as any other
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in ("onnxc", *LAYERS)]
            assert not found, f"{path}:{node.lineno}: imports inside the package are relative, found {found}"
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert (node.module or "").split(".")[0] != "onnxc", f"{path}:{node.lineno}: not a relative import"
                continue
            assert node.level <= len(package) + 1, f"{path}:{node.lineno}: reaches out of the package"
            base = package[: len(package) + 1 - node.level]
            targets = [node.module.split(".")] if node.module else [[alias.name] for alias in node.names]
            for target in targets:
                whole = [*base, *target]
                if whole[0] in LAYERS:
                    yield node.lineno, whole[0]


def test_a_layer_imports_only_itself_and_those_below() -> None:
    wrong = []
    seen = set()
    for names, path in modules():
        for line, layer in imports(names, path):
            seen.add((names[0], layer))
            if LAYERS.index(layer) > LAYERS.index(names[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {layer}")
    assert not wrong, "\n".join(wrong)
    assert {("passes", "ir"), ("backends", "passes"), ("compiler", "backends"), ("tools", "compiler")} <= seen


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from ..backends.cpu import build\n    from ..ir import text\n")
    assert list(imports(("passes", "module"), path)) == [(2, "backends"), (3, "ir")]
    path.write_text("from onnxc.ir import graph\n")
    with pytest.raises(AssertionError, match="not a relative import"):
        list(imports(("passes", "module"), path))


def loaded_by(code: str) -> set[str]:
    """Names of all modules that a new Python has loaded after running `code`."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_does_no_work() -> None:
    new = {name.split(".")[0] for name in loaded_by("import onnxc") - loaded_by("")}
    assert new - set(sys.stdlib_module_names) == {"onnxc"}


def test_the_help_does_not_start_the_compiler() -> None:
    code = "from onnxc.tools.cli import run\nimport io, contextlib\n"
    code += "with contextlib.redirect_stdout(io.StringIO()): run(['--help'])"
    assert not {"numpy", "onnx", "llvmlite"} & loaded_by(code)


def test_public_names_are_there() -> None:
    for name in onnxc.__all__:
        assert getattr(onnxc, name) is not None
        assert name in dir(onnxc)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        onnxc.nonsense  # noqa: B018


def test_every_package_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {"onnxc"} | {
        ".".join(("onnxc", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(settings["packages"]) == there
    for package, patterns in settings["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert all(any(folder.glob(pattern)) for pattern in patterns), f"{package} lacks {patterns}"


def test_no_file_is_too_long() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for _, path in modules()}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FILE}
