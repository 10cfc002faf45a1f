"""README.md: its code runs, its dumps are what is printed, its table is current, and what it names exists."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxc
import pytest
from onnxc.ir.ops import REGISTRY
from onnxc.tools import cli
from onnxc.tools.operator_table import PART, missing, rows, table, version_line

ROOT = Path(onnxc.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EDIT = re.compile(r"# (?P<file>\S+\.py)(?:, (?P<how>at its end|a new file|in (?P<table>\w+)))?\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading it is under, its language and its content."""

    heading: str
    language: str
    content: str

    @property
    def edit(self) -> re.Match[str] | None:
        """The first line of a block that shows or changes a file."""
        return EDIT.match(self.content)


def blocks() -> Iterator[Block]:
    lines: list[str] = []
    heading, language, indent = "", None, 0
    for line in TEXT.splitlines():
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if language is None and fence:
            language, lines, indent = fence[2], [], len(fence[1])
        elif fence:
            assert language is not None
            yield Block(heading, language, "\n".join(lines) + "\n")
            language = None
        elif language is not None:
            lines.append(line[indent:])
        elif line.startswith("## "):
            heading = line[3:]


BLOCKS = list(blocks())
ADDING = [heading for heading in dict.fromkeys(block.heading for block in BLOCKS) if heading.startswith("Adding")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which tools/digits.onnx is where a checkout has it."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_kind_of_block_is_known() -> None:
    assert {block.language for block in BLOCKS} == {"python", "console", "c"}
    assert len(ADDING) == 3


def test_python_blocks_run_one_after_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in BLOCKS:
        if block.language == "python" and block.edit is None and block.heading not in ADDING:
            exec(compile(block.content, f"README.md, {block.heading}", "exec"), names)
            for line, comment in re.findall(r"^ *print\((.*?)\) *# (.*)$", block.content, re.MULTILINE):
                if line in ("model", "error"):
                    assert shows(comment, capsys.readouterr().out), comment
    assert (folder / "digits.onnxc").exists()


def shows(line: str, output: str) -> bool:
    """Whether some line of `output` is the line shown, where "..." stands for anything and spaces do not count."""
    pieces = [re.escape(re.sub(r"\s+", " ", piece.strip())) for piece in line.split("...")]
    pattern = re.compile(".*".join(pieces))
    return any(pattern.fullmatch(re.sub(r"\s+", " ", found.strip())) for found in output.splitlines())


def test_dots_stand_for_anything_else_for_itself() -> None:
    assert shows("a ... c", "x\n  a   b c\n")
    assert not shows("a ... c", "a b d")
    assert not shows("a b", "a b c")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console"], ids=lambda block: block.heading)
def test_commands_print_what_is_shown(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ""
    for line in block.content.splitlines():
        if not line.startswith("$ "):
            assert shows(line, output), f"not printed: {line}\nbut:\n{output[:2000]}"
            continue
        command, *arguments = shlex.split(line[2:])
        if command == "onnxc":
            code = cli.run(arguments)
            output = capsys.readouterr().out
        else:
            code = subprocess.run([command, *arguments], check=False).returncode
        assert code == 0, line


def test_the_c_program_runs(folder: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    (program,) = (block.content for block in BLOCKS if block.language == "c")
    (command,) = re.findall(r"`(cc .*?)`", TEXT)
    (folder / "main.c").write_text(program)
    assert cli.run(["compile", "tools/digits.onnx", "-o", "digits.o"]) == 0
    subprocess.run([compiler, *shlex.split(command)[1:]], check=True)
    assert cli.run(["compile", "tools/digits.onnx", "-o", "digits.o", "--threads", "1"]) == 0
    subprocess.run([compiler, "main.c", "digits.o", "-o", "single"], check=True)
    assert subprocess.check_output("./main") == subprocess.check_output("./single")
    shares = [float(line.split(": ")[1]) for line in subprocess.check_output("./main", text=True).splitlines()]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1, abs=0.01)


def copy_of_the_project(folder: Path) -> Path:
    """The package in a folder of its own, to be changed."""
    package = folder / "onnxc"
    for layer in ("ir", "passes", "backends", "compiler", "tools"):
        shutil.copytree(ROOT / layer, package / layer, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, package / name)
    return package


def apply(block: Block, package: Path) -> None:
    """Makes the change that a block asks for."""
    edit = block.edit
    assert edit is not None
    path, content = package / edit["file"], block.content[edit.end() :]
    if edit["how"] == "a new file":
        assert not path.exists()
        path.write_text(content)
    elif edit["table"]:
        head, line, tail = re.split(rf"(^{edit['table']}\b.*\n)", path.read_text(), maxsplit=1, flags=re.MULTILINE)
        path.write_text(f"{head}{line}{content}{tail}")
    else:
        path.write_text(f"{path.read_text()}\n\n{content}")


@pytest.mark.parametrize("heading", ADDING)
def test_what_is_added_works(heading: str, folder: Path) -> None:
    package = copy_of_the_project(folder)
    mine = [block for block in BLOCKS if block.heading == heading and block.language == "python"]
    examples = [block for block in mine if block.edit is None]
    assert len(examples) == 1 < len(mine)
    (folder / "example.py").write_text(examples[0].content)
    command = [sys.executable, "example.py"]  # beside the changed package, which is found first
    before = subprocess.run(command, capture_output=True, text=True, check=False)
    assert before.returncode != 0, "the example works without what is added"
    for block in mine:
        if block.edit is not None:
            apply(block, package)
    after = subprocess.run(command, capture_output=True, text=True, check=False)
    assert after.returncode == 0, after.stderr


def test_code_that_is_shown_is_the_code() -> None:
    shown = [block for block in BLOCKS if block.edit and not block.edit["how"]]
    assert shown
    for block in shown:
        assert block.edit is not None
        assert block.content[block.edit.end() :] in (ROOT / block.edit["file"]).read_text(), block.edit["file"]


def test_the_table_of_operators_is_current() -> None:
    shown = TEXT.partition(PART.begin)[2].partition(PART.end)[0]
    assert set(REGISTRY) - {row.name for row in rows()} <= set(missing())
    if version_line() in shown:
        assert PART.renewed(TEXT, table()) == TEXT, "the declarations have changed: run `make readme`"
    else:  # another onnx has other operators and types: ours are there all the same
        listed = set(re.findall(r"[\w.]+", shown))
        assert {row.name for row in rows() if row.name in REGISTRY} <= listed
    with pytest.raises(ValueError, match="lacks the lines"):
        PART.renewed(TEXT.replace(PART.end, ""), "")
    assert TEXT.index(PART.begin) < TEXT.index(PART.end)


def test_what_is_named_exists() -> None:
    prose = re.sub(r"```.*?```", "", TEXT.partition(PART.begin)[0], flags=re.DOTALL)
    paths = [text for text in re.findall(r"`([\w./]+)`", prose) if "/" in text]
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
    for command in re.findall(r"onnxc (\w+) ", prose):
        assert command in cli.COMMANDS
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)  ", prose)) <= targets
