# shellcheck shell=bash
# Sourced by the scripts for a host with NVIDIA GPUs; sources common.sh.
#   use_gpus .[EXTRA,…]   installs JAX for CUDA and the extras beside the pins into .venv, and sets,
#                         unless it is set already:
#   JAX_PLATFORMS=cuda,cpu     GPUs that JAX cannot use are an error, not a run on the CPU
#   JAX_COMPILATION_CACHE_DIR  .cache/jax in the checkout: a run that goes on compiles nothing again
#   XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
#                              JAX takes this part of each GPU's memory at its start and hands it
#                              out itself. Its own default, 0.75, is for a GPU that is shared; the
#                              rest is for CUDA, cuDNN and NCCL, so take less if these run out of
#                              memory, not JAX. XLA_PYTHON_CLIENT_PREALLOCATE=false takes memory as
#                              it is needed, which is slower, and leaves gaps in it
#   XLA_FLAGS                  of several GPUs --xla_gpu_enable_latency_hiding_scheduler=true: the
#                              exchange of gradients runs beside the computation, not after it
# What the flag gains has not been measured here; `dmd-jax bench` with and without it tells.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_gpus() { # .[EXTRA,…]
  local gpus count driver
  command -v nvidia-smi >/dev/null ||
    fail "nvidia-smi is not on the PATH; expected an NVIDIA GPU and its driver"
  gpus=$(nvidia-smi --query-gpu=driver_version --format=csv,noheading) ||
    fail "nvidia-smi does not work: ${gpus//$'\n'/ }"
  count=$(printf '%s\n' "$gpus" | grep -c '^[0-9]') || fail "nvidia-smi lists no GPU"
  driver=${gpus%%$'\n'*}
  if [ "${driver%%.*}" -lt 580 ]; then
    say "the driver is $driver, and CUDA 13, which is installed with JAX, needs 580 or newer"
  fi

  use_environment "$checkout/.venv"
  install_requirements requirements.txt "$1"

  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$checkout/.cache/jax}
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
  if [ "$count" -gt 1 ]; then
    export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}
  fi
}
