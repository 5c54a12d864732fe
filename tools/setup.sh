# Sourced by demo.sh and test.sh: a virtual environment with this checkout installed in it.
# Sets `python` and `sslus`. Does nothing where that is done already.
#   SSLUS_VENV   the environment (default: .venv in the checkout)
#   SSLUS_WHEEL  a wheel to install instead of building one

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SSLUS_VENV:-$root/.venv}
python=$venv/bin/python
sslus=$venv/bin/sslus

if ! command -v python3 >/dev/null || ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: needs python3 3.11 or newer on the PATH" >&2
  exit 1
fi

# What is installed belongs to these files: if none changed, there is nothing to do.
stamp=$(cd "$root" && cat pyproject.toml CMakeLists.txt \
  $(find engine kernels ssl tools -name '*.py' -o -name '*.cpp' -o -name '*.h' | sort) | cksum)
if [ "$(cat "$venv/sslus-stamp" 2>/dev/null)" != "$stamp" ]; then
  if [ -z "${SSLUS_WHEEL:-}" ] && ! command -v c++ >/dev/null; then
    echo "setup: needs a C++ compiler (Debian: apt-get install g++)" >&2
    exit 1
  fi
  echo "setup: installing into $venv (the first time this downloads about 5 GB)" >&2
  # Asked for pip: without Debian's python3-venv, an environment is left that has none.
  "$python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$venv"
  package=${SSLUS_WHEEL:-$root}
  "$python" -m pip install --quiet --disable-pip-version-check "$package[test]"
  # pip keeps a package whose version number did not change: replace the code itself.
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$package"
  echo "$stamp" >"$venv/sslus-stamp"
fi
