#!/usr/bin/env bash
# The whole method on the digits, from nothing: installs what it needs, distils, evaluates, and
# leaves report.html, samples.png and results.json in runs/quickstart of the checkout. Arguments
# go to `dmd-jax quickstart`, for example --workdir DIR.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_environment "$checkout/.venv"
install_requirements requirements.txt
exec "$environment/bin/dmd-jax" quickstart --workdir "$checkout/runs/quickstart" "$@"
