# shellcheck shell=bash
# Sourced by the scripts beside it, under `set -euo pipefail`.
#   use_environment            sets $python: that of the active virtual environment, else of .venv
#                              in the checkout, which is made if it is not there
#   install_requirements FILE… installs the pins of the files and the checkout itself into it;
#                              at once where that was done before and no pin has changed since

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

fail() {
  say "error: $*"
  exit 1
}

is_recent() { # PYTHON
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

use_environment() {
  environment=${VIRTUAL_ENV:-$checkout/.venv}
  python=$environment/bin/python
  if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -e "$python" ] && [ ! -L "$python" ]; then
    make_environment
  fi
  is_recent "$python" || fail "$python is no working Python 3.11 or newer:" \
    "deactivate $environment if it is the active environment, else remove it, and try again"
}

make_environment() {
  local name found without_venv=''
  # The pins are those of Python 3.11, so it comes first.
  for name in python3.11 python3.12 python3.13 python3; do
    found=$(command -v "$name") || continue
    is_recent "$found" || continue
    if "$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      say "making the virtual environment $environment with $found"
      "$found" -m venv "$environment"
      return
    fi
    without_venv=${without_venv:-$found}
  done
  if [ -n "$without_venv" ]; then
    name=$("$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    fail "$without_venv has no venv module, which makes virtual environments;" \
      "on Debian and Ubuntu: apt-get install $name"
  fi
  fail "found no Python 3.11 or newer among python3.11, python3.12, python3.13 and python3;" \
    "on Debian and Ubuntu: apt-get install python3.11 python3.11-venv"
}

install_requirements() { # FILE…, paths in the checkout
  local file pins stamp arguments=()
  for file in "$@"; do
    arguments+=(--requirement "$checkout/$file")
  done
  # What was installed last, one stamp for each combination of files, named after the last.
  stamp=$environment/.dmd_jax-${file##*/}
  pins="$checkout $(cd "$checkout" && cat setup.py "$@" | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then
    return
  fi
  rm -f "$stamp"
  say "installing $* into $environment (a minute or two)"
  # An environment without pip is one that uv made, or one whose making was interrupted.
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
  "$python" -m pip install -qq "${arguments[@]}"
  "$python" -m pip install -qq --no-deps --no-build-isolation --editable "$checkout"
  printf '%s\n' "$pins" >"$stamp"
}
