#!/usr/bin/env bash
# The tests, from nothing: installs what they need and runs pytest in the checkout. Arguments go to
# pytest; --with-torch adds the tests whose oracle is PyTorch, and --with-tpu those by the TPU
# compiler, which needs no TPU; both install what they need.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

requirements=(requirements.txt)
arguments=()
without=() # what pyproject.toml leaves out by its own -m
for name in torch tpu; do
  if [[ " $* " == *" --with-$name "* ]]; then
    requirements+=("tests/requirements-$name.txt")
  else
    without+=("not $name")
  fi
done
for argument in "$@"; do
  case $argument in
    --with-torch | --with-tpu) ;;
    *) arguments+=("$argument") ;;
  esac
done
# A -m of the user's comes after this one.
marks=$(printf ' and %s' ${without[@]+"${without[@]}"})
arguments=(-m "${marks# and }" ${arguments[@]+"${arguments[@]}"})

use_environment "$checkout/.venv"
install_requirements "${requirements[@]}"
cd "$checkout"
# Two at a time: a test compiles for longer than it computes, which keeps one core busy. A file's
# tests share what they prepare. Files run in the order of tests/conftest.py, the longest first, and
# not those of the most tests.
exec "$python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder \
  ${arguments[@]+"${arguments[@]}"}
