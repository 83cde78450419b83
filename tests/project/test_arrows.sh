#!/usr/bin/env bash
# Proves that no source looks into a room against the arrows of the architecture, and that this test would notice one that does.
# Refuses to pass on an empty list of sources.
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"

check() {
    local sources
    mapfile -d '' sources < <(cd "$1" && find io kernels comm jobs -type f \( -name '*.[ch]' -o -name '*.def' -o -name '*.cu' -o -name '*.cuh' \) -print0)
    ((${#sources[@]} > 0)) || fail "no sources under $1"
    (cd "$1" && awk -f "$CUPEL_SOURCE/tests/project/arrows.awk" "${sources[@]}")
}

found=$(check "$CUPEL_SOURCE")
[[ -z $found ]] || fail $'against the arrows:\n'"$found"

# Every kind of offence, planted in a copy, is seen, and only that one.
for room in io kernels comm jobs; do mkdir -p "copy/$room"; done
cp -r "$CUPEL_SOURCE"/{io,kernels,comm,jobs} copy/
planted=0
plant() {
    printf '/* planted */\n%s\n' "$2" >"copy/$1"
    found=$(check copy)
    [[ $found == "$1:2: "* && $found != *$'\n'* ]] || fail "planted '$2' in $1, saw: ${found:-nothing}"
    rm "copy/$1"
    planted=$((planted + 1))
}
plant io/base/planted.c '#include "io/record.h"'
plant io/base/planted.h '#include "kernels/kernels.h"'
plant io/planted.c '#include "comm/comm.h"'
plant io/planted.h '  #  include "jobs/options.h"'
plant kernels/planted.c '#include "io/record.h"'
plant kernels/cpu/planted.c '#include "comm/comm.h"'
plant comm/planted.c '#include "io/checkpoint.h"'
plant comm/planted.c '#include "jobs/options.h"'
plant jobs/planted.c '#include "kernels/cpu/cpu.h"'
plant jobs/planted.c '#include "options.h"'
plant jobs/model/planted.c '#include "../options.h"'
plant jobs/planted.c '#include <mpi.h>'
plant kernels/planted.h '#include <mpi.h>'
plant jobs/planted.c '#include <hdf5.h>'
plant io/base/planted.c '#include <H5public.h>'
plant comm/planted.c '#include <cuda_runtime.h>'
plant jobs/planted.c '#ifdef CUPEL_CUDA'
plant comm/planted.c '#if defined(HAVE_NCCL)'
[[ -z $(check copy) ]] || fail "the copy is not clean again"
echo "arrows hold; $planted planted offences were seen"
