#!/usr/bin/env bash
# The whole job on this machine: installs what is missing, builds build/cpu, runs the study of jobs/quickstart.yaml on 2 ranks over the King James Bible.
# Refuses nothing that is done already: packages that are there, a build that is up to date and finished stages are left as they are.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash jobs/quickstart.sh [--text FILE] [--out DIR] [--ranks N] [--set stage.option=value]...

  --text FILE   train on this text instead of the King James Bible (Debian's bible-kjv)
  --out DIR     where the results go                                  default: build/quickstart
  --ranks N     MPI ranks                                             default: 2
  --set S.O=V   another value for an option of the study, as in: cupel run --set
TEXT
}
wrong() {
    echo "cupel: $1" >&2
    usage >&2
    exit 2
}

source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$source_dir/build/quickstart text='' ranks=2 sets=()
while (($#)); do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --text | --out | --ranks | --set) (($# >= 2)) || wrong "$1: expected a value" ;;&
    --text) text=$2 ;;
    --out) out=$2 ;;
    --ranks) ranks=$2 ;;
    --set) sets+=(--set "$2") ;;
    *) wrong "unknown option $1" ;;
    esac
    shift 2
done
[[ $ranks =~ ^[1-9][0-9]{0,3}$ ]] || wrong "--ranks $ranks: expected a number from 1 to 9999"
[[ -z $text || -r $text ]] || wrong "--text $text: cannot be read"

groups=(build)
[[ -n $text ]] || groups+=(text)
bash "$source_dir/jobs/deps.sh" "${groups[@]}"

build=$source_dir/build/cpu
build() {
    [[ -e $build/build.ninja ]] || (cd "$source_dir" && cmake --preset cpu -DCUPEL_TESTS=OFF)
    cmake --build "$build" --target cupel
}
mkdir -p "$build" "$out"
out=$(realpath "$out")
[[ -z $text ]] || text=$(realpath "$text")
[[ -x $build/cupel ]] || echo "cupel: building $build" >&2
log=$build/quickstart.log
build >"$log" 2>&1 || { tail -n 40 "$log" >&2; echo "cupel: the build failed, all of it is in $log" >&2; exit 1; }

# One verse a line, without its number. Beside and renamed: a text is whole or not there.
if [[ -z $text ]]; then
    text=$out/kjv.txt
    if [[ ! -s $text ]]; then
        bible -f 'gen1:1-rev22:21' </dev/null | sed -E 's/^[^ ]+ +//' >"$text.part"
        mv "$text.part" "$text"
    fi
fi

# Open MPI: root must be allowed, more ranks than cores too, and a machine without ssh must not be asked for it.
if ((EUID == 0)); then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent=false
cores=$(nproc)
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none # Open MPI 5
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

status=0
mpirun -n "$ranks" "$build/cupel" run "$source_dir/jobs/quickstart.yaml" --out "$out" --set "corpus.train=$text" "${sets[@]}" </dev/null || status=$?
((status == 0)) || { echo "cupel: the study ended with exit status $status; the same command goes on from there" >&2; exit $status; }
