#!/usr/bin/env bash
# Looks whether this machine has what cupel needs, and installs what is missing where it may:  bash jobs/deps.sh [build] [text] [test] [slurm]
# Refuses to install what is already there, from packages or otherwise: it looks for the compiler, header or program itself.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

pc() { pkg-config --exists "$1"; }
header() { echo "#include <$1>" | cc -E - -o /dev/null; }
any_hdf5() { pc hdf5-openmpi || pc hdf5-mpich || pc hdf5 || pc hdf5-serial || command -v h5pcc || command -v h5cc; }
# Not any cblas.h: the reference BLAS has one too, and is many times slower.
any_matmul() { header dnnl.h || pc openblas || pc blis || pc mkl-dynamic-lp64-seq; }
slurm_with_pmix() { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch && compgen -G '/usr/lib/*/slurm*/mpi_pmix.so'; }

# need GROUP PACKAGES CHECK: the packages of Debian 12, 13 and Ubuntu 24.04 are missing where the group is asked for and the check fails.
missing=()
need() { [[ " $groups " != *" $1 "* ]] || eval "$3" >/dev/null 2>&1 || missing+=($2); }
look() {
    need build 'gcc libc6-dev' 'command -v cc && header stdio.h'
    need build cmake 'command -v cmake'
    need build ninja-build 'command -v ninja'
    need build pkg-config 'command -v pkg-config'
    need build 'libopenmpi-dev openmpi-bin' 'command -v mpicc && command -v mpirun'
    need build libhdf5-openmpi-dev any_hdf5
    need build libdnnl-dev any_matmul
    need build libyaml-dev 'pc yaml-0.1 || header yaml.h'
    need text bible-kjv 'command -v bible'
    need test libcmocka-dev 'pc cmocka'
    need test clang-format-14 'command -v clang-format-14'
    need test clang-tidy-14 'command -v clang-tidy-14'
    need test hdf5-tools 'command -v h5dump'
    need test git 'command -v git'
    need slurm 'munge slurmd slurmctld slurm-client slurm-wlm-basic-plugins libpmix2' slurm_with_pmix
    need slurm 'iproute2 util-linux procps hostname' 'command -v ip && command -v unshare && command -v pgrep && command -v hostname'
}

# Daemons that come with packages (munge, slurmd) are not to be started: the tests run their own.
policy=/usr/sbin/policy-rc.d
as_root=()
install() {
    local log status=0
    log=$(mktemp)
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
        trap '"${as_root[@]}" rm -f $policy' EXIT
        "${as_root[@]}" chmod 755 $policy
    fi
    "${as_root[@]}" apt-get -q update </dev/null >"$log" 2>&1 || status=$?
    # oneDNN is not packaged for every architecture; a CBLAS is. Newer releases have other versions of clang: those tests are skipped then.
    local package packages=()
    for package in "$@"; do
        if ((status == 0)) && ! apt-cache show "$package" >/dev/null 2>&1; then
            case $package in
            libdnnl-dev) package=libopenblas-dev ;;
            clang-*-14) echo "cupel: no package $package here: its test will be skipped" >&2; continue ;;
            esac
        fi
        packages+=("$package")
    done
    set -- "${packages[@]}"
    (($#)) || { rm -f "$log"; return 0; }
    echo "cupel: installing $*" >&2
    ((status)) || "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -yq install --no-install-recommends "$@" \
        </dev/null >"$log" 2>&1 || status=$?
    ((status == 0)) || { tail -n 20 "$log"; echo "cupel: apt-get could not install $*"; } >&2
    rm -f "$log"
    return $status
}

main() {
    local group
    for group in "$@"; do
        [[ $group =~ ^(build|text|test|slurm)$ ]] || { echo "usage: bash jobs/deps.sh [build] [text] [test] [slurm]" >&2; exit 2; }
    done
    groups=${*:-build text}
    look
    ((${#missing[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        echo "cupel: missing on this machine: what Debian and Ubuntu call ${missing[*]}" >&2
        exit 1
    elif ((EUID != 0)); then
        if ! command -v sudo >/dev/null || { [[ ! -t 0 ]] && ! sudo -n true 2>/dev/null; }; then
            echo "cupel: missing on this machine, and this user may not install them; as root: apt-get install ${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    install "${missing[@]}"
}
main "$@"
