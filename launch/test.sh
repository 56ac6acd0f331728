#!/usr/bin/env bash
# The tests, from nothing: installs what they need and runs pytest in the checkout. Arguments go to
# pytest; --with-torch adds the tests whose oracle is PyTorch, and installs that too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

requirements=(requirements.txt)
arguments=()
for argument in "$@"; do
  if [ "$argument" = --with-torch ]; then
    requirements+=(tests/requirements-torch.txt)
    # An empty -m undoes the "not torch" of pyproject.toml; a -m of the user's comes after it.
    arguments=(-m '' ${arguments[@]+"${arguments[@]}"})
  else
    arguments+=("$argument")
  fi
done

use_environment
install_requirements "${requirements[@]}"
cd "$checkout"
exec "$python" -m pytest ${arguments[@]+"${arguments[@]}"}
