#!/usr/bin/env bash
# What the experiments of the paper need of a TPU, by the TPU compiler and without a TPU: compiles
# each one's step for the slices below and prints a table of memory and time. Machine code for
# ImageNet-64's or Stable Diffusion's step takes two cores half an hour to an hour and a quarter, and
# up to 40 GB of memory, of which swap may be half; what a FOLDER has from an earlier run is not
# compiled again.
#   tpu_table.sh [FOLDER]     (default: runs/tpu_table of the checkout)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=${1:-$checkout/runs/tpu_table}
results=()

row() { # CONFIG TOPOLOGY MESH [ARGUMENT…]
  local name=$1-${2//:/-} code=0 option
  for option in "${@:4}"; do
    case $option in *.compute_dtype=* | *.matmul_precision=*) name+=-${option##*=} ;; esac
  done
  local result=$folder/$name.json
  results+=("$result")
  if [ -e "$result" ]; then
    return
  fi
  "$environment/bin/dmd-jax" compile --config "configs/$1.py" --topology "$2" --mesh "$3" \
    --json "$result" "${@:4}" || code=$?
  # 1 says that it does not fit, which the table tells.
  [ "$code" -le 1 ] || exit "$code"
}

use_environment "$checkout/.venv"
install_requirements requirements.txt '.[tpu]'
mkdir -p "$folder"
folder=$(cd "$folder" && pwd -P)
cd "$checkout"
row cifar10_cond v5e:2x4 data=8 --config.matmul_precision=highest
row cifar10_cond v5e:2x4 data=8 --config.matmul_precision=high
row cifar10_cond v5e:2x4 data=8 --config.compute_dtype=bfloat16
row imagenet64 v5e:4x4 data=1,fsdp=16 --config.accumulation=3
row sd15_laion625 v5p:4x4x4 data=4,fsdp=16 --config.remat=none
row sd15_laion625 v5e:16x16 data=16,fsdp=16
row sd15_laion625 v6e:8x8 data=4,fsdp=16 --config.remat=none --config.accumulation=3
row sd15_laion625 v4:4x4x4 data=4,fsdp=16 --config.remat=none --config.accumulation=3
exec "$environment/bin/dmd-jax" compile --join "${results[@]}"
