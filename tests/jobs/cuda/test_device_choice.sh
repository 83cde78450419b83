# Which GPU a rank computes on, as launchers show GPUs to ranks; more ranks than GPUs are refused unless they may share; what a stage
# drew and held stands in the results.
# Refuses to pass without a GPU: it is skipped and says so.
# ctest: TIMEOUT 600
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
"$CUPEL" info >info.txt || fail "info"
grep -q '^ GPU 0 ' info.txt || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
gpus=$(grep -c '^ GPU [0-9]' info.txt)
unset CUPEL_RANKS_PER_GPU
tiny_text text.txt
tiny_job job.yaml
for key in CUDA cuBLASLt cuDNN energy 'GPU memory'; do has info.txt " $key"; done
((gpus == 1)) || has info.txt " links of GPU 0"

# refused DEVICE TEXT: 2 ranks that see one GPU.
refused() {
    local status=0
    CUDA_VISIBLE_DEVICES=0 ranks 2 "$CUPEL" run job.yaml --quiet --out refused --set run.device="$1" >out.txt 2>&1 || status=$?
    ((status == 2)) || { cat out.txt >&2; fail "2 ranks on one GPU, device $1: exit status $status"; }
    has out.txt "2 ranks see 1 GPU"
    has out.txt "ranks_per_gpu: 2"
    [ ! -e refused ] || fail "a job that could not begin made its folder"
}
refused auto
refused cuda
CUDA_VISIBLE_DEVICES=0 ranks 2 "$CUPEL" run job.yaml --quiet --out shared --set run.device=cuda --set run.ranks_per_gpu=2 >out.txt 2>&1 ||
    { cat out.txt >&2; fail "2 ranks that may share"; }
CUDA_VISIBLE_DEVICES=0 ranks 1 "$CUPEL" run job.yaml --quiet --out alone --set run.device=cuda >out.txt 2>&1 || { cat out.txt >&2; fail "1 rank"; }

if ((gpus >= 2)); then
    ranks 2 "$CUPEL" info | grep -E '^ ranks? [0-9]' >all.txt || fail "info of 2 ranks"
    [ "$(wc -l <all.txt)" = 2 ] || { cat all.txt >&2; fail "2 ranks that see all GPUs have the same one"; }
    ranks 2 sh -c 'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec "$0" info' "$CUPEL" | grep -E '^ ranks? [0-9]' >one.txt || fail "info, one GPU visible"
    cmp all.txt one.txt || fail "ranks that see one GPU each have others than those that see all"
    ranks 2 "$CUPEL" run job.yaml --quiet --out both --set run.device=cuda >out.txt 2>&1 || { cat out.txt >&2; fail "2 ranks on 2 GPUs"; }
    ranks 4 "$CUPEL" info | grep -cE '^ ranks 0 to 1 ' >/dev/null || fail "of 4 ranks on 2 GPUs neighbours share one"
fi

# Energy: of one GPU, once. Memory: the allocator's peak, and what the driver says.
energy() { attribute "$1/results.h5" /stages/teacher/energy_j; }
if grep -q '^ energy  *NVML' info.txt; then
    [ "$(attribute alone/results.h5 /stages/teacher/energy_source)" = NVML ] || fail "energy_source"
    for run in alone shared; do
        awk -v j="$(energy $run)" -v s="$(attribute $run/results.h5 /stages/teacher/wall_s)" 'BEGIN { exit !(j >= 0 && j < 1500 * (s + 1)) }' ||
            fail "$run: $(energy $run) J are no energy of one GPU"
    done
fi
peak=$(attribute alone/results.h5 /stages/teacher/device_bytes_peak) used=$(attribute alone/results.h5 /stages/teacher/device_bytes_used)
((used > peak && peak > 64 << 20)) || fail "peak $peak, in use $used"
exit 0
