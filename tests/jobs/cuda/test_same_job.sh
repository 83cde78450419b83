# The same job on the CPU and on a GPU: losses in fp32, validation loss in 16 bits, the same bits twice, after a resume, and on 1 and 2 ranks of
# one GPU with reduction tree; a fault injected on one rank is skipped by all; a study of every kind of stage.
# Refuses to pass without a GPU: it is skipped and says so.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
"$CUPEL" info >info.txt || fail "info"
grep -q '^ GPU ' info.txt || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
tiny_text text.txt
tiny_job job.yaml
run() { # run DIR RANKS DEVICE [SETTING]...
    local dir=$1 n=$2 device=$3 sets=()
    shift 3
    for s in "$@"; do sets+=(--set "$s"); done
    ranks "$n" "$CUPEL" run job.yaml --out "$dir" --quiet --set run.device="$device" "${sets[@]}" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir"; }
}

run cpu 1 cpu teacher.precision=fp32 teacher.steps=100
run gpu 1 cuda teacher.precision=fp32 teacher.steps=100
close cpu gpu /stages/teacher/loss 1e-4
for p in bf16 fp16 tf32; do
    run $p 1 cuda teacher.precision=$p teacher.steps=100
    run $p-again 1 cuda teacher.precision=$p teacher.steps=100
    same "$(model $p)" "$(model $p-again)" param m v metrics_eval
    close cpu $p /stages/teacher/val_loss 0.02
    for r in gelu block; do
        run $r-$p 1 cuda teacher.precision=$p teacher.recompute=$r teacher.steps=100
        same "$(model $p)" "$(model $r-$p)" param m v
    done
    run tree-$p-1 1 cuda teacher.precision=$p teacher.reduction=tree
    run tree-$p-2 2 cuda teacher.precision=$p teacher.reduction=tree
    same "$(model tree-$p-1)" "$(model tree-$p-2)" param m v
done

# A resume: a signal stops the run on its way, the same command goes on from its checkpoint to the bits of one that was not stopped.
long=(teacher.precision=bf16 teacher.steps=3000 teacher.eval_every=0 run.checkpoint_every=0)
run whole 1 cuda "${long[@]}"
"$CUPEL" run job.yaml --out half "${long[@]/#/--set=}" --set=run.device=cuda >half.txt 2>&1 &
for ((i = 0; i < 600; i++)); do
    grep -q '"event":"step"' half/log.jsonl 2>/dev/null && break
    sleep 0.05
done
kill -USR2 $!
status=0
wait $! || status=$?
((status == 75)) || { cat half.txt >&2; fail "exit status $status after USR2, expected 75"; }
run half 1 cuda "${long[@]}"
(($(attribute half/results.h5 stages/teacher/resumed_from_step) > 0)) || fail "the run began anew"
same "$(model whole)" "$(model half)" param m v

run fault 2 cuda teacher.precision=fp16 teacher.loss_scale=1024 teacher.inject_step=2 teacher.inject_rank=1 teacher.inject_tensor=wte
[ "$(values fault/results.h5 /stages/teacher/overflow)" = "0 0 1 0 0 0" ] || fail "overflow: $(values fault/results.h5 /stages/teacher/overflow)"
run fault-alone 1 cuda teacher.precision=fp16 teacher.loss_scale=1024 teacher.inject_step=2 teacher.inject_tensor=wte
[ "$(values fault-alone/results.h5 /stages/teacher/overflow)" = "0 0 1 0 0 0" ] || fail "overflow alone"

# Every kind of stage, with the hidden states of a narrower student: the same study, to about the same losses.
tiny_study job.yaml
sed -i 's/student, teacher: teacher, layers: 1,/student, teacher: teacher, start: scratch, width: 16, hidden_weight: 1, layers: 1,/' job.yaml
run study-cpu 1 cpu
run study-gpu 1 cuda
for values in /stages/student/hidden_loss /stages/student/loss; do close study-cpu study-gpu $values 0.02; done
close study-cpu study-gpu /stages/grid/val_loss 0.05
exit 0
