# Several GPUs, through NCCL alone and where they reach each other's memory: the bits of sums, of training jobs with and without it, sharded and
# replicated, linear and tree, after a fault on one rank; and a rank that is killed ends the other within seconds.
# Refuses to pass with fewer than 2 GPUs: it is skipped and says so.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/comm/cuda/nccl.sh"
((${gpus:-0} >= 2)) || skip "2 GPUs are needed, ${gpus:-0} are here"

for ((n = 2; n <= gpus && n <= 4; n++)); do
    for reach in 0 1; do
        CUPEL_REACH=$reach ranks $n "$CUPEL_BUILD/ranks_nccl" >out.txt 2>&1 || { cat out.txt >&2; fail "ranks_nccl on $n ranks, CUPEL_REACH=$reach"; }
        has out.txt "$n ranks"
    done
done

# A GPU that does not see the other's cannot reach it: said, and NCCL does it all.
hidden='CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec "$CUPEL" run job.yaml --set run.device=cuda --out "$0"'
ranks 2 bash -c "$hidden" hidden >out.txt 2>&1 || { cat out.txt >&2; fail "one visible GPU a rank"; }
has out.txt "sums go through NCCL alone: rank 0: GPU"
CUPEL_REACH=1 ranks 2 bash -c "$hidden" demanded >out.txt 2>&1 && fail "CUPEL_REACH=1 with one visible GPU a rank"
has out.txt "CUPEL_REACH=1 demands GPUs that reach each other's memory: rank 0: GPU"

# first_step DIR PID: waits until the job PID has made a step.
first_step() {
    for ((i = 0; i < 600; i++)); do
        grep -q '"event":"step"' "$1/log.jsonl" 2>/dev/null && return
        kill -0 "$2" 2>/dev/null || { cat out.txt >&2; fail "$1: ended before its first step"; }
        sleep 0.1
    done
    fail "$1: no step in 60 s"
}

# The tiny model's gradient fits one bucket; a wider one goes in several.
for size in teacher.width=32 'teacher.width=512 teacher.layers=4 teacher.heads=8'; do
    w=${size%% *} w=${w#*=}
    for p in fp32 bf16 fp16; do
        run mpi-2-$w-$p 2 0 teacher.precision=$p $size
        CUPEL_REACH=0 run nccl-$w-$p 2 1 teacher.precision=$p $size
        same "$(model mpi-2-$w-$p)" "$(model nccl-$w-$p)" param m v metrics_eval
        for ((n = 2; n <= gpus && n <= 4; n++)); do
            settings="teacher.precision=$p teacher.global_batch=$((n == 3 ? 24 : 16)) $size"
            ((n == 2)) || run mpi-$n-$w-$p $n 0 $settings
            CUPEL_REACH=1 run reach-$n-$w-$p $n 1 $settings
            has out.txt "from GPU to GPU"
            same "$(model mpi-$n-$w-$p)" "$(model reach-$n-$w-$p)" param m v metrics_eval
            run replicated-$n-$w-$p $n 1 $settings teacher.optimizer=replicated
            same "$(model mpi-$n-$w-$p)" "$(model replicated-$n-$w-$p)" param m v
        done
        CUPEL_OVERLAP=1 run early-$w-$p 2 1 teacher.precision=$p $size
        same "$(model mpi-2-$w-$p)" "$(model early-$w-$p)" param m v metrics_eval
        run tree-1-$w-$p 1 0 teacher.precision=$p teacher.reduction=tree $size
        for ((n = 2; n <= gpus && n <= 4; n *= 2)); do
            run tree-$n-$w-$p $n 1 teacher.precision=$p teacher.reduction=tree $size
            same "$(model tree-1-$w-$p)" "$(model tree-$n-$w-$p)" param m v
        done
    done
done

# A run that a signal stopped and the same command continued has the bits of one that was not stopped.
long=(teacher.precision=bf16 teacher.width=512 teacher.layers=4 teacher.heads=8 teacher.steps=2000 teacher.eval_every=0 run.checkpoint_every=0)
run whole 2 1 "${long[@]}"
settings=()
for s in "${long[@]}"; do settings+=(--set "$s"); done
CUPEL_NCCL=1 ranks 2 "$CUPEL" run job.yaml --out half --set run.device=cuda "${settings[@]}" >out.txt 2>&1 &
first_step half $!
pkill -USR2 -f "^$CUPEL run job.yaml --out half"
status=0
wait $! || status=$?
((status == 75)) || { cat out.txt >&2; fail "exit status $status after USR2, expected 75"; }
run half 2 1 "${long[@]}"
has out.txt "resuming from step"
same "$(model whole)" "$(model half)" param m v

for nccl in 0 1 2; do
    CUPEL_REACH=$((nccl / 2)) run fault-$nccl 2 $((nccl > 0)) teacher.precision=fp16 teacher.loss_scale=1024 teacher.inject_step=2 teacher.inject_rank=1 teacher.inject_tensor=wte
    [ "$(values fault-$nccl/results.h5 /stages/teacher/overflow)" = "0 0 1 0 0 0" ] || fail "overflow: $(values fault-$nccl/results.h5 /stages/teacher/overflow)"
done
same "$(model fault-0)" "$(model fault-1)" param m v
same "$(model fault-0)" "$(model fault-2)" param m v
for n in 0 1 2; do
    grep -o '"event":"overflow".*' fault-$n/log.jsonl >overflow-$n.txt || fail "fault-$n: no overflow event"
    cmp overflow-0.txt overflow-$n.txt || fail "fault-$n: another overflow than fault-0"
done

# A rank is killed in the middle of its work: the job ends soon, and says which rank it was.
CUPEL_NCCL=1 ranks 2 "$CUPEL" run job.yaml --out killed --set run.device=cuda --set teacher.width=512 --set teacher.layers=8 --set teacher.heads=8 \
    --set teacher.context=256 --set teacher.steps=1000000 --set teacher.eval_every=0 --set run.checkpoint_every=1000000 >out.txt 2>&1 &
job=$!
first_step killed $job
victim=$(pgrep -f "^$CUPEL run job.yaml --out killed" | tail -n 1)
[ -n "$victim" ] || fail "no rank to kill"
begun=$SECONDS
kill -9 "$victim"
status=0
wait $job || status=$?
((status != 0 && status != 124)) || fail "exit status $status after a rank was killed"
((SECONDS - begun <= 15)) || fail "the job ended $((SECONDS - begun)) s after a rank was killed"
grep -Eq 'rank [01] of this host has ended|process rank [01] .* exited on signal 9' out.txt || { cat out.txt >&2; fail "no message names the rank that was killed"; }
! pgrep -f "^$CUPEL run job.yaml --out killed" >/dev/null || fail "a rank is left"
exit 0
