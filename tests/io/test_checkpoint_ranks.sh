#!/usr/bin/env bash
# Proves that a checkpoint of 1 to 4 ranks, cut anywhere, written together or in turn, comes back bit by bit with 1 to 4 ranks, and that
# a failure on one rank ends all in order. Refuses warnings: a write that is not collective would show as one.
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"
export RANKS_TIMEOUT=250

check() {
    "$@" >out.txt 2>&1 || { cat out.txt >&2; fail "$*"; }
    ! grep -q warning out.txt || { cat out.txt >&2; fail "a warning from $*"; }
}
mkdir -p free small
check ranks 4 "$CUPEL_BUILD/ranks_checkpoint" all free
[[ $(ls -A free) == a.h5 ]] || fail "something is left beside a.h5: $(ls -A free)"

# A disk that is really too small, where we may make one.
if ((EUID == 0)) && mount -t tmpfs -o size=8m none small 2>/dev/null; then
    trap 'umount small' EXIT
    check ranks 3 "$CUPEL_BUILD/ranks_checkpoint" full small
    has out.txt "small/a.h5.part: needs "
    has out.txt "No space left on device"
    [[ -z $(ls -A small) ]] || fail "something is left on the full disk: $(ls -A small)"
else
    echo "no disk of its own could be mounted: that part was left out"
fi
