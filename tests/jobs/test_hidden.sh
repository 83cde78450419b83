# Distillation with the hidden-state loss, students as wide as their teacher and narrower: the loss it adds falls, has the same bits on 1 and 2 ranks and
# after kill -9, and the projection that it trains is in checkpoints but in no model. Refuses a student that a later stage sees as another one.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
export OMPI_MCA_btl_vader_backing_directory=$PWD OMPI_MCA_osc_sm_backing_directory=$PWD # killed ranks leave their shared memory behind
tiny_text text.txt
tiny_job job.yaml
cat >>job.yaml <<'YAML'
  - distill: {name: student, teacher: teacher, layers: 1, steps: 40, micro_batch: 2, global_batch: 16, lr: 5e-3, warmup: 0, reduction: tree, hidden_weight: 0.5}
YAML
run() { # run DIR RANKS [SETTING]...
    local dir=$1 n=$2 sets=()
    shift 2
    for s in "$@"; do sets+=(--set "$s"); done
    ranks "$n" "$CUPEL" run job.yaml --out "$dir" --set teacher.reduction=tree "${sets[@]}" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir"; }
}
student() { echo "$1/$(attribute "$1/results.h5" stages/student/model)"; }
series() { values "$1/results.h5" "/stages/student/$2"; }
figure() { attribute "$1/results.h5" "stages/student/$2"; }
arrays=(param m v metrics_step metrics_eval)
beside=(projection projection_m projection_v)
narrow=(student.start=scratch student.width=16 student.heads=2)

for p in fp32 fp16; do
    for n in 1 2; do
        run equal-$p-$n $n student.precision=$p
        run narrow-$p-$n $n student.precision=$p "${narrow[@]}"
    done
    same "$(student equal-$p-1)" "$(student equal-$p-2)" "${arrays[@]}"
    same "$(student narrow-$p-1)" "$(student narrow-$p-2)" "${arrays[@]}" "${beside[@]}"
    [[ $(series narrow-$p-1 loss) == "$(series narrow-$p-2 loss)" ]] || fail "$p: the loss depends on the ranks"
    for kind in equal narrow; do
        set -- $(series $kind-$p-1 hidden_loss)
        (($# == 40)) || fail "$kind, $p: $# hidden losses of 40 steps"
        awk "BEGIN { exit !($1 > 0 && ${40} > 0 && ${40} < 0.5 * $1) }" || fail "$kind, $p: the hidden loss went from $1 to ${40}"
    done
done

# The loss is the sum of its parts: with alpha 0, cross-entropy and hidden_weight times the distance. Without it there is neither series nor projection.
run parts 2 "${narrow[@]}" student.alpha=0 student.hidden_weight=3
paste <(series parts loss | tr ' ' '\n') <(series parts hard_loss | tr ' ' '\n') <(series parts hidden_loss | tr ' ' '\n') |
    awk '{ d = $1 - $2 - 3 * $3; if (d * d > 1e-18) bad++; n++ } END { exit !(n == 40 && bad == 0) }' || fail "the loss is not the sum of its parts"
run none 2 "${narrow[@]}" student.hidden_weight=0
h5dump -n none/results.h5 >names.txt && ! grep -q hidden_loss names.txt || fail "a hidden loss that was not computed"
h5dump -n "$(student none)" >names.txt && ! grep -q projection names.txt || fail "a projection that was not needed"
h5dump -n "$(student equal-fp32-1)" >names.txt && ! grep -q projection names.txt || fail "a projection between equal widths"

# Killed with all its ranks after a checkpoint of the student, it goes on to the same bits, on another number of ranks too.
long=("${narrow[@]}" student.steps=400 run.checkpoint_every=10 run.keep_checkpoints=100)
run unbroken 2 "${long[@]}"
key=$(basename "$(dirname "$(student unbroken)")")
resumed=0
for n in 1 2; do
    for ((try = 0; try < 20; try++)); do
        rm -rf "broken-$n"
        setsid timeout 120 mpirun -n 2 "$CUPEL" run job.yaml --out "broken-$n" --set teacher.reduction=tree "${long[@]/#/--set=}" >killed.txt 2>&1 </dev/null &
        job=$!
        until [[ -e broken-$n/checkpoints/$key/step-20.h5 ]] || ! kill -0 $job 2>/dev/null; do sleep 0.01; done
        pkill -KILL -s $job
        { wait $job; } 2>/dev/null
        [[ -e broken-$n/stages/student.h5 || ! -e broken-$n/checkpoints/$key/step-20.h5 ]] || break
    done
    run "broken-$n" $n "${long[@]}"
    ! grep -q 'student: resuming from step' out.txt || resumed=$((resumed + 1))
    same "$(student unbroken)" "$(student "broken-$n")" "${arrays[@]}" "${beside[@]}"
done
((resumed == 2)) || { cat killed.txt out.txt >&2; fail "$resumed of 2 killed runs went on from a checkpoint"; }

# Later stages see the model and no projection: sizes, weights and validation loss (of passes as large) are those of the student; a student can teach.
cat >>job.yaml <<'YAML'
  - eval: {name: measured, model: student, micro_batch: 2, latency_runs: 0}
  - prune: {name: pruned, model: student, sparsity: 0.5, include: all, finetune_steps: 3, micro_batch: 2, global_batch: 16, lr: 1e-4, warmup: 0}
  - quantize: {name: int8, model: pruned, bits: 8}
  - eval: {name: small, model: int8, latency_runs: 0}
  - sweep: {name: grid, model: [student], prune: {sparsity: [0, 0.5]}, quantize: {bits: [16, 8]}, latency_runs: 0}
  - distill: {name: smaller, teacher: student, start: scratch, width: 8, heads: 1, steps: 3, micro_batch: 2, global_batch: 16, warmup: 0, hidden_weight: 1}
YAML
run later 2 "${narrow[@]}"
run plain 2 "${narrow[@]}" student.hidden_weight=0
has out.txt "8 of 8 stages ran"
for a in student/parameters student/bytes measured/bytes pruned/prunable_weights int8/quantized_weights small/parameters; do
    [[ $(attribute later/results.h5 stages/$a) == "$(attribute plain/results.h5 stages/$a)" ]] || fail "$a counts the projection"
done
[[ $(values later/results.h5 /stages/grid/bytes) == "$(values plain/results.h5 /stages/grid/bytes)" ]] || fail "the sweep counts the projection"
[[ $(attribute later/results.h5 stages/grid/trials_failed) == 0 ]] || fail "trials failed"
[[ $(attribute later/results.h5 stages/measured/val_loss) == "$(attribute later/results.h5 stages/student/val_loss)" ]] || fail "another student is evaluated"
"$CUPEL" report later >report.txt || fail "report"
has report.txt "smaller"

# The projection is a tensor of the run: a fault in its gradient is found there. What is no weight is refused, with its place.
run fault 2 "${narrow[@]}" student.precision=fp16 student.inject_step=1 student.inject_tensor=distill.projection
h5dump -d /stages/student/overflow_events fault/results.h5 | tr -d ' \n' | grep -q '1,0,"distill.projection","inf"' || fail "no row of the overflow"
refused() { # refused WEIGHT TEXT
    local status=0
    sed "s/hidden_weight: 0.5/hidden_weight: $1/" job.yaml >bad.yaml
    "$CUPEL" run bad.yaml --out bad --quiet >out.txt 2>&1 || status=$?
    ((status == 2)) || { cat out.txt >&2; fail "hidden_weight $1: status $status, expected 2"; }
    has out.txt "bad.yaml:7:$(awk 'NR == 7 { print index($0, "hidden_weight") + length("hidden_weight: ") }' bad.yaml): "
    has out.txt "$2"
}
refused -1 "hidden_weight: expected a number from 0 to 1000000, got '-1'"
refused 2e6 "hidden_weight: expected a number from 0 to 1000000, got '2e6'"
refused much "hidden_weight: expected a number from 0 to 1000000, got 'much'"
refused 1e-12 "hidden_weight: expected 0 or at least 1e-09, got 1e-12"
[[ ! -e bad ]] || fail "a job that was refused made its folder"
exit 0
