#!/usr/bin/env bash
# Install FFCV 1.0.2 into the environment of a given Python: bash tools/install_ffcv.sh PYTHON
#
# FFCV has a compiled part. What it needs from Debian is installed where this user may; where not, one message names the
# missing packages and the status is 0, because everything but FFCV's own format works without it (data.store=npy).
set -euo pipefail

python=${1:?"usage: install_ffcv.sh PYTHON"}
# shellcheck source=tools/_apt.sh
source "$(dirname "${BASH_SOURCE[0]}")/_apt.sh"
log=$(mktemp)
shim=$(mktemp -d)
trap 'rm -rf "$log" "$shim"' EXIT

if "$python" -c 'import ffcv' 2>/dev/null; then
    exit 0
fi

has_library() { { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -q "$1"; }
has_header() { echo "#include <$1>" | g++ -I/usr/include/opencv4 -fsyntax-only -xc++ - 2>/dev/null; }

missing_packages() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    has_header turbojpeg.h || echo libturbojpeg0-dev
    has_header opencv2/imgproc.hpp || pkg-config --exists opencv4 2>/dev/null || echo libopencv-imgproc-dev
    has_library libGL.so.1 || echo libgl1
    has_library libglib-2.0.so.0 || echo libglib2.0-0
    "$python" -c 'import pathlib, sysconfig as s, sys; sys.exit(not pathlib.Path(s.get_paths()["include"], "Python.h").exists())' || echo python3-dev
}

give_up() {
    echo "FFCV is not installed: $1. Going on without it: public sets are kept as .npy files (data.store=npy)." >&2
    exit 0
}

mapfile -t packages < <(missing_packages)
if [ ${#packages[@]} -gt 0 ]; then
    echo "FFCV needs Debian packages: ${packages[*]}" >&2
    apt_install "${packages[@]}" || give_up "the Debian packages ${packages[*]} are missing and could not be installed"
fi

# FFCV asks for all of OpenCV (690 MB); it uses two modules of it. Where the whole is not there, describe these two.
if ! pkg-config --exists opencv4; then
    mkdir "$shim/opencv2"
    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/opencv2/opencv.hpp"
    cat >"$shim/opencv4.pc" <<END
Name: OpenCV
Description: core and imgproc
Version: 4
Cflags: -I$shim -I/usr/include/opencv4
Libs: -lopencv_core -lopencv_imgproc
END
    export PKG_CONFIG_PATH="$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
fi

"$python" -m pip install -q 'ffcv==1.0.2' 'numba>=0.61' >"$log" 2>&1 || give_up "it did not build ($(grep -m1 -iE 'error' "$log" || tail -n1 "$log"))"
"$python" -c 'import ffcv' 2>"$log" || give_up "it does not load ($(tail -n1 "$log"))"
