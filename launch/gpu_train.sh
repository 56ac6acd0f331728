#!/usr/bin/env bash
# Trains on all NVIDIA GPUs of this host, from nothing: installs what it needs into .venv and runs
# `dmd-jax train` with the arguments. What it sets of JAX's environment is in gpu.sh.
set -euo pipefail
# shellcheck source=launch/gpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

use_gpus '.[gpu]'
exec "$environment/bin/dmd-jax" train "$@"
