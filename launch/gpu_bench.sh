#!/usr/bin/env bash
# What one NVIDIA GPU does: CIFAR-10's step at the paper's batch and Stable Diffusion's at the
# paper's 32 + 16 images a GPU, each beside PyTorch; one image from text to pixels; and Fashion-MNIST
# from its images to a one-step generator, by the clock. Figures and machine are in FOLDER's files,
# and what has its file there is not done again.
#   gpu_bench.sh [--small] [FOLDER]   (default: runs/gpu_bench of the checkout)
# --small rehearses the same without a GPU, at sizes for two CPU cores: its figures mean nothing.
set -euo pipefail
# shellcheck source=launch/gpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

small=''
if [ "${1:-}" = --small ]; then
  small=yes
  shift
fi
folder=${1:-$checkout/runs/gpu_bench}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd -P)

bench() { # NAME ARGUMENT…
  local result=$folder/$1.json
  [ -e "$result" ] ||
    PYTHONPATH=$checkout "$environment/bin/dmd-jax" bench --json "$result" --separately \
      --peer tests.torch_peer:eager --peer tests.torch_peer:compiled "${@:2}"
}

fashion_mnist() { # CONFIG IMAGES SAMPLES EVALUATE [OVERRIDE…]
  local result=$folder/fashion_mnist.seconds lpips=$folder/lpips.safetensors began=$SECONDS
  local common=(--config "$1" "--config.data.images=$2" "${@:5}")
  common+=("--config.teacher.weights=$folder/teacher" "--config.lpips.weights=$lpips")
  [ ! -e "$result" ] || return 0
  rm -rf "$folder/teacher" "$folder/ablation" # what is there already would be none of the time
  "$environment/bin/dmd-jax" convert lpips "$lpips"
  "$environment/bin/dmd-jax" teacher "${common[@]}" --workdir "$folder/teacher"
  "$environment/bin/dmd-jax" ablate "${common[@]}" --workdir "$folder/ablation" \
    --rows full,without_matching --seeds 0 --num "$3" \
    --evaluate "--features vgg16 --lpips $(printf %q "$lpips") --repeat-grey $4"
  say "Fashion-MNIST, from its images to the measured one-step generator: $((SECONDS - began)) s"
  printf '%d\n' $((SECONDS - began)) >"$result"
}

images=pad2:data/fashion-mnist
[ -e "$checkout/data/fashion-mnist" ] || images=pad2:tfds:fashion_mnist:train
cd "$checkout"
if [ -n "$small" ]; then
  use_environment "$checkout/.venv"
  install_requirements requirements.txt tests/requirements-torch.txt '.[lpips,tfds,torch]'
  sd=tests/configs/sd_shaped.py
  bench cifar10_cond --config configs/cifar10_cond.py --steps 2 --config.batch_size=2 \
    --config.objective.regression_batch_size=2 --config.lpips.resolution=32
  bench sd15 --config $sd --steps 2
  bench sd15_latency --config $sd --what latency --steps 5
  fashion_mnist configs/fashion_mnist.py:cpu "$images" 640 \
    '--vgg-resolution 64 --num-reference 1000' --config.teaching.steps=20 \
    --config.pairs.count=200 --config.steps=20
else
  use_gpus '.[gpu,lpips,tfds,torch]'
  bench cifar10_cond --config configs/cifar10_cond.py --config.compute_dtype=bfloat16
  bench sd15 --config configs/sd15_laion625.py --config.batch_size=32 \
    --config.objective.regression_batch_size=16
  bench sd15_latency --config configs/sd15_laion625.py --what latency --steps 100
  fashion_mnist configs/fashion_mnist.py "$images" 10000 ''
fi
say "the figures are in $folder"
