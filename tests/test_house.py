"""The rules of the house that a machine can check."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A floor may import itself and the floors below; bench/ and tests/ import anything installed.
MAY = {
    "engine": {"engine"},
    "kernels": {"kernels"},
    "ssl": {"ssl", "engine", "kernels"},
    "tools": {"tools", "ssl", "engine", "kernels"},
}
ALONE = {"click": {"tools"}, "rich": {"tools", "bench"}}  # who may import it
# What `sslus --help` may load besides the standard library: every other package costs start-up.
HELP_MAY_LOAD = {"click", "sslus"}
HELP_SECONDS = 0.2


def run(*command, cwd=ROOT, **kwargs):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


def imports(path: Path):
    """(module, is_relative, is at the top of the module) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level > 0, id(node) in top


def test_tests_run_against_the_installed_package():
    import sslus.engine.video

    assert not Path(sslus.engine.video.__file__).is_relative_to(ROOT / "engine")
    assert importlib.metadata.version("sslus") == sslus.__version__


@pytest.mark.parametrize("how", ["-c", "pytest", "console script"])
def test_the_standard_ssl_is_not_shadowed(how, tmp_path):
    code = "import ssl, pathlib; ssl.create_default_context; print(pathlib.Path(ssl.__file__))"
    if how == "-c":
        out = run(sys.executable, "-c", code)
        assert out.returncode == 0, out.stderr
        assert not Path(out.stdout.strip()).is_relative_to(ROOT)
    elif how == "pytest":  # this process is one, started in the checkout or above it
        test = tmp_path / "test_ssl.py"
        test.write_text("def test():\n    import ssl\n    assert ssl.create_default_context\n")
        out = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))
        assert out.returncode == 0, out.stdout
    else:
        script = Path(sys.executable).with_name("sslus")
        code = f"import runpy\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\n" + (
            f"except SystemExit as e: assert not e.code, e.code\n{code}"
        )
        out = run(sys.executable, "-c", f"import sys; sys.argv[1:] = ['--version']\n{code}")
        assert out.returncode == 0, out.stderr
        assert not Path(out.stdout.splitlines()[-1]).is_relative_to(ROOT)


@pytest.mark.parametrize("floor", MAY)
def test_no_floor_has_an_init(floor):
    assert not (ROOT / floor / "__init__.py").exists()


@pytest.mark.parametrize("floor", [*MAY, "bench", "tests"])
def test_imports_go_down_and_are_absolute(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        for name, relative, top in imports(path):
            assert not relative, f"{path}: relative import of {name!r}"
            first, _, rest = name.partition(".")
            assert first not in MAY, f"{path}: imports {name!r} as a second copy; use sslus.{name}"
            if first == "sslus" and floor in MAY:
                assert rest.split(".")[0] in MAY[floor] | {""}, f"{path}: imports {name}"
            if first in ALONE:
                assert floor in ALONE[first] | {"tests"}, f"{path}: imports {name}"
            if floor == "engine":
                heavy = {"torch", "torchvision", "nvidia", "timm", "sklearn", "matplotlib"}
                assert not (top and first in heavy), f"{path}: imports {name} at its top"


def test_no_file_is_named_like_a_standard_module():
    for folder in [*MAY, "bench", "tests"]:
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem not in sys.stdlib_module_names, path


def loaded_by(*arguments: str) -> set[str]:
    """The packages, standard library aside, that a run of the command loads."""
    code = (
        "import sys, json\n"
        "before = set(sys.modules)\n"
        "from sslus.tools.cli import main\n"
        f"main({list(arguments)!r})\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - set(sys.stdlib_module_names))))\n"
    )
    out = run(sys.executable, "-c", code)
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["shard", "--help"], ["synth", "--help"]])
def test_help_loads_next_to_nothing(arguments):
    # nanobind and numpy free: a package that appears here slows every start of the command.
    extra = {m for m in loaded_by(*arguments) - HELP_MAY_LOAD if not m.startswith("_")}
    assert extra == set()


def test_help_is_quick():
    command = [str(Path(sys.executable).with_name("sslus")), "--help"]

    def cpu_seconds() -> float:
        before = os.times()
        assert run(*command).returncode == 0
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # The quickest of five: what the machine does besides is not the command's fault.
    assert min(cpu_seconds() for _ in range(5)) < HELP_SECONDS


def test_import_loads_no_torch():
    code = "import sslus, sys; print('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout == "False\n"


def test_wrong_usage_is_one_line_and_exit_2():
    out = run(sys.executable, "-m", "sslus.tools", "shard", "--no-such-option")
    assert out.returncode == 2
    assert "No such option" in out.stderr and "Traceback" not in out.stderr
