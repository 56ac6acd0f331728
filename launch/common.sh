# shellcheck shell=bash
# Sourced by the scripts beside it, under `set -euo pipefail`.
#   use_environment FOLDER     sets $python: that of the active virtual environment, else of FOLDER,
#                              which is made if it is not there
#   install_requirements FILE… [.[EXTRA,…]]
#                              installs the pins of the files and the checkout itself into it, with
#                              its extras if they are named; at once where that was done before and
#                              no pin has changed since
#   find_python                sets $found: a Python that can make environments; 1 if there is none

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

use_environment() { # FOLDER
  environment=${VIRTUAL_ENV:-$1}
  python=$environment/bin/python
  if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -e "$python" ] && [ ! -L "$python" ]; then
    make_environment
  fi
  is_recent "$python" || fail "$python is no working Python 3.11 or newer:" \
    "deactivate $environment if it is the active environment, else remove it, and try again"
}

find_python() {
  local name
  without_venv=''
  # The pins are those of Python 3.11, so it comes first.
  for name in python3.11 python3.12 python3.13 python3; do
    found=$(command -v "$name") || continue
    is_recent "$found" || continue
    if "$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      return 0
    fi
    without_venv=${without_venv:-$found}
  done
  return 1
}

make_environment() {
  local name
  if find_python; then
    say "making the virtual environment $environment with $found"
    "$found" -m venv "$environment"
    return
  fi
  if [ -n "$without_venv" ]; then
    name=$("$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    fail "$without_venv has no venv module, which makes virtual environments;" \
      "on Debian and Ubuntu: apt-get install $name"
  fi
  fail "found no Python 3.11 or newer among python3.11, python3.12, python3.13 and python3;" \
    "on Debian and Ubuntu: apt-get install python3.11 python3.11-venv"
}

install_requirements() { # FILE… [.[EXTRA,…]], paths in the checkout
  local file pins stamp what="$*" extras='' arguments=() files=()
  for file in "$@"; do
    case $file in
      .\[*) extras=${file#.} ;;
      *) files+=("$file") arguments+=(--requirement "$checkout/$file") ;;
    esac
  done
  # What was installed last, one stamp for each combination, named after the last argument.
  stamp=$environment/.dmd_jax-${file##*/}
  pins="$checkout $(cd "$checkout" && cat setup.py "${files[@]}" | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then
    return
  fi
  rm -f "$stamp"
  say "installing $what into $environment (a minute or two)"
  # An environment without pip is one that uv made, or one whose making was interrupted.
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
  "$python" -m pip install -qq "${arguments[@]}"
  if [ -n "$extras" ]; then
    # The pins once more: what the extras bring must fit to them, not replace them.
    "$python" -m pip install -qq "${arguments[@]}" --no-build-isolation \
      --editable "$checkout$extras"
  else
    "$python" -m pip install -qq --no-deps --no-build-isolation --editable "$checkout"
  fi
  printf '%s\n' "$pins" >"$stamp"
}
