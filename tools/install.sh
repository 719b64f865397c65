#!/usr/bin/env bash
# install.sh PYTHON VENV: a virtual environment with PrivImage, its extras, and FFCV where it can be built.
# Safe to run again. Uses root or sudo for Debian packages; without either it names what is missing and how to go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-python3}
venv=${2:-.venv}
# shellcheck source=tools/_apt.sh
source tools/_apt.sh

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install: PrivImage needs Python 3.11 or newer and '$python' is not; name one: make install PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if [ ! -x "$venv/bin/pip" ]; then
    # Debian ships venv without ensurepip until python3-venv is there.
    "$python" -c 'import ensurepip' 2>/dev/null || apt_install python3-venv || exit 2
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --editable '.[cluster,dev]'
bash tools/install_ffcv.sh "$venv/bin/python"
