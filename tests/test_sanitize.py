"""The C++ that reads bytes of files, and the views, under the sanitizers: tools/sanitize.sh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "sanitize.sh"
COMPILER = os.environ.get("CXX", "g++")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """A compiler whose sanitizers are installed."""
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "a.cpp").write_text("int main() { return 0; }\n")
    for sanitizer in ("address,undefined", "thread"):
        command = [COMPILER, f"-fsanitize={sanitizer}", str(folder / "a.cpp"), "-o"]
        if (
            not shutil.which(COMPILER)
            or subprocess.run([*command, str(folder / "a.out")], capture_output=True).returncode
        ):
            pytest.skip(f"{COMPILER} has no -fsanitize={sanitizer} here")
    return COMPILER


def test_the_sanitizers_find_nothing(compiler):
    done = subprocess.run(["bash", str(SCRIPT), "100"], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "nothing found"
    assert [x for x in done.stdout.splitlines() if x.startswith("==")] == [
        "== jpeg", "== packbits", "== address", "== threads", "== baseline", "== processor",
    ]  # fmt: skip
