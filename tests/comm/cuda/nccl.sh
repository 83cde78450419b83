# Sourced by the tests of NCCL: how many GPUs are here, and jobs with and without it.
# Refuses to run without a GPU or without NCCL in the build: the test is skipped and says so.
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"

"$CUPEL" info >info.txt || fail "info"
grep -q '^ GPU ' info.txt || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
! grep -q '^ NCCL .*not in this build' info.txt || skip "NCCL is not in this build"
gpus=$(sed -n 's/^ CUDA .* \([0-9]*\) GPUs\{0,1\}$/\1/p' info.txt)
tiny_text text.txt
tiny_job job.yaml

# run DIR RANKS NCCL [SETTING]...: trains; NCCL 1 demands it, 0 takes MPI.
run() {
    local dir=$1 n=$2 nccl=$3 sets=()
    shift 3
    for s in "$@"; do sets+=(--set "$s"); done
    CUPEL_NCCL=$nccl ranks "$n" "$CUPEL" run job.yaml --out "$dir" --set run.device=cuda "${sets[@]}" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir"; }
    if [ "$nccl" = 1 ]; then has out.txt "through NCCL"; fi
}
