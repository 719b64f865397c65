# shellcheck shell=bash
# Sourced: Debian packages with root or sudo, or one line that names them.

# apt_install PACKAGE...: install those that are missing. Status 1, with a message, where that is not possible.
apt_install() {
    local missing=() package as_root=()
    for package in "$@"; do
        dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if [ "$(id -u)" -ne 0 ]; then
        as_root=(sudo -n)
        if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
            echo "missing Debian packages: ${missing[*]}; ask an administrator for: apt-get install ${missing[*]}" >&2
            return 1
        fi
    fi
    "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 -qq update &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}
