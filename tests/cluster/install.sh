#!/usr/bin/env bash
# Installs what the tests of this folder start, on Debian and its kin, as root.
set -euo pipefail
packages=(iproute2 munge openmpi-bin openssh-client openssh-server pdsh slurm-client slurmctld slurmd)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} != 0 ] || exit 0
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Their daemons are not to be started: a tool that is asked says no, where there is none yet.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
quickly=(-o Acquire::Retries=0 -o Acquire::http::Timeout=10)
apt-get -qq "${quickly[@]}" update
apt-get -qq "${quickly[@]}" install --yes --no-install-recommends "${missing[@]}" >/dev/null
