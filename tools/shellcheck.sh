#!/usr/bin/env bash
# Check every shell script of the project; installs shellcheck where it may.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/_apt.sh
source tools/_apt.sh
apt_install shellcheck || { echo "shellcheck: skipped" >&2; exit 0; }
git ls-files -z -- '*.sh' '*.sbatch' .ci/run | xargs -0 shellcheck --external-sources
