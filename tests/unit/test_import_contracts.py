"""What the import graph alone can't say: who reads the environment, and what an import really loads.

The layers themselves are checked by import-linter (.importlinter, run by .ci/run).
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import atom

PACKAGE = Path(atom.__file__).parent
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
HEAVY = ("torch", "transformers", "tokenizers", "triton", "numpy", "fastapi", "uvicorn", "aiohttp", "zmq")


def environment_uses(source: str) -> list[int]:
    """Lines that reach the process environment through the os module, under any alias."""
    tree = ast.parse(source)
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in ("os", "posix")
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            if isinstance(node.value, ast.Name) and node.value.id in modules:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            lines += [node.lineno for alias in node.names if alias.name in ENVIRONMENT | {"*"}]
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = '1'",
        "import os as system\nsystem.getenv('A')",
        "from os import environ",
        "def f():\n    import os\n    return os.environ.get('A')",
    ],
)
def test_scan_sees_every_way_to_the_environment(source: str) -> None:
    assert environment_uses(source)


def test_scan_lets_other_uses_of_os_pass() -> None:
    assert environment_uses("import os\nos.path.join('a', 'b')\nself.environ = 1") == []


def test_only_envs_touches_the_environment() -> None:
    offenders = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() != "utils/envs.py"
        for line in environment_uses(path.read_text(encoding="utf-8"))
    }
    assert not offenders


def modules_loaded_by(code: str, *arguments: str) -> set[str]:
    """Names in sys.modules after running `code` in a fresh interpreter."""
    report = "import atexit, sys\natexit.register(lambda: sys.stderr.write('\\nLOADED ' + ' '.join(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", report + code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.rpartition("\nLOADED ")[2].split())


@pytest.mark.parametrize(
    ("code", "arguments", "evidence"),
    [
        pytest.param("import atom", (), "atom", id="import atom"),
        pytest.param("import atom.config", (), "atom.config", id="import atom.config"),
        pytest.param(
            "from atom.entrypoints.cli import main; sys.exit(main())",
            ("--help",),
            "atom.entrypoints.cli",
            id="atom --help",
        ),
        pytest.param(
            "from atom.entrypoints.cli import main; sys.exit(main())",
            ("generate", "--help"),
            "atom.model_engine.arg_utils",
            id="atom generate --help",
        ),
    ],
)
def test_light_imports_stay_light(code: str, arguments: tuple[str, ...], evidence: str) -> None:
    loaded = modules_loaded_by(code, *arguments)
    assert evidence in loaded
    assert loaded.isdisjoint(HEAVY)


def test_probe_sees_a_heavy_import() -> None:
    assert "numpy" in modules_loaded_by("import numpy")
