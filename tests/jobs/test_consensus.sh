# An overflow on any one of 1, 2, 3, 4 ranks, in any tensor, of either kind, skips the step on all ranks: parameters and both moments keep their bits.
# Refuses a run that merely survives: the scale must have halved, and the event must name step, rank, tensor and kind.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml
tensors=(wte wpe h.0.attn.qkv.weight h.1.mlp.out.bias ln_f.gain)
kinds=(inf nan)
case_number=0
for n in 1 2 3 4; do
    ranks "$n" "$CUPEL" run job.yaml --out "clean$n" --quiet --set teacher.steps=2 >out.txt 2>&1 || { cat out.txt >&2; fail "clean run on $n ranks"; }
    for ((r = 0; r < n; r++)); do
        tensor=${tensors[case_number % 5]} kind=${kinds[case_number % 2]} dir=case$case_number
        case_number=$((case_number + 1))
        ranks "$n" "$CUPEL" run job.yaml --out "$dir" --set teacher.steps=3 --set teacher.inject_step=2 --set "teacher.inject_rank=$r" \
            --set "teacher.inject_tensor=$tensor" --set "teacher.inject_kind=$kind" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir: rank $r of $n"; }
        same "$(model "clean$n")" "$(model "$dir")" param m v
        [[ $(attribute "$(model "$dir")" adam_step) == 2 ]] || fail "$dir: Adam's step count advanced on the skipped step"
        [[ $(attribute "$(model "$dir")" loss_scale) == 32768 ]] || fail "$dir: the loss scale did not halve"
        grep '"event":"overflow"' "$dir/log.jsonl" >events.txt || fail "$dir: no overflow event"
        [[ $(wc -l <events.txt) == 1 ]] || fail "$dir: more than one rank reports an overflow"
        has events.txt "\"step\":2,\"rank\":$r,\"tensor\":\"$tensor\",\"kind\":\"$kind\""
    done
done

# A step between good ones: training goes on from the same weights, with Adam's own count of steps.
ranks 2 "$CUPEL" run job.yaml --out middle --quiet --set teacher.steps=4 --set teacher.inject_step=1 --set teacher.inject_rank=1 >out.txt 2>&1 || { cat out.txt >&2; fail "overflow between good steps"; }
[[ $(attribute "$(model middle)" adam_step) == 3 ]] || fail "Adam's step count is not 3 after 4 steps with one skipped"
h5dump -d /stages/teacher/overflow middle/results.h5 | grep -q '0, 1, 0, 0' || fail "results.h5 does not record which step overflowed"

# Overflow that never ends stops the job with a message that names step, rank, tensor and kind.
status=0
ranks 2 "$CUPEL" run job.yaml --out stuck --set teacher.steps=30 --set teacher.loss_scale=4 --set teacher.inject_step=3 --set teacher.inject_count=30 --set teacher.inject_rank=1 \
    --set teacher.inject_tensor=ln_f.gain --set teacher.inject_kind=nan --set teacher.overflow_limit=4 >out.txt 2>&1 || status=$?
[[ $status == 1 ]] || { cat out.txt >&2; fail "endless overflow ended with status $status, expected 1"; }
grep -qE 'teacher: step 8: overflow on 4 steps in a row at loss scale 1.*rank 1, gradient of ln_f.gain, nan' out.txt || { cat out.txt >&2; fail "message of the endless overflow"; }
echo "$case_number cases"
