# A sweep killed and started again runs only the missing trials; a trial that fails is recorded and the rest go on; groups of ranks share trials out.
# Refuses a zero where there is no result.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml
cat >>job.yaml <<'YAML'
  - sweep:
      name: grid
      model: [teacher]
      prune: {sparsity: [0, 0.25, 0.5, 0.75], finetune_steps: [0, 60], micro_batch: 2, global_batch: 8, lr: 1e-3, warmup: 0}
      quantize: {bits: [16, 4], granularity: channel}
      latency_runs: 2
YAML
ranks 2 "$CUPEL" run job.yaml --out whole --quiet >out.txt 2>&1 || { cat out.txt >&2; fail "whole sweep"; }
all=$(ls whole/trials/*.h5 | wc -l)
((all == 16)) || fail "$all trial files, expected 16"

setsid timeout 120 mpirun -n 2 "$CUPEL" run job.yaml --out cut --quiet >cut.txt 2>&1 </dev/null &
job=$!
for ((i = 0; i < 1200; i++)); do (($(ls cut/trials/*.h5 2>/dev/null | wc -l) >= 4)) && break; sleep 0.05; done
pkill -KILL -s "$job" || true
{ wait "$job"; } 2>/dev/null
kept=$(ls cut/trials/*.h5 | wc -l)
((kept >= 4 && kept < 16)) || fail "$kept trials were finished when the job was killed; expected 4 to 15"
stat -c '%n %Y %i' cut/trials/*.h5 >before.txt
ranks 2 "$CUPEL" run job.yaml --out cut >out.txt 2>&1 || { cat out.txt >&2; fail "the run after the kill"; }
has out.txt "$((16 - kept)) to run"
while read -r line; do grep -qxF "$line" <(stat -c '%n %Y %i' cut/trials/*.h5) || fail "a finished trial was run again: $line"; done <before.txt
for array in val_loss bytes sparsity_exact; do
    h5diff whole/results.h5 cut/results.h5 "/stages/grid/$array" "/stages/grid/$array" >diff.txt 2>&1 || { cat diff.txt >&2; fail "$array differs after the kill"; }
done

# One of two models is damaged: its trials fail, the other's are there, and the stage is done.
sed '/- sweep/,$d' job.yaml >teacher.yaml
"$CUPEL" run teacher.yaml --out second --quiet --set seed=8 >out.txt 2>&1 || { cat out.txt >&2; fail "second model"; }
cp "$(model whole)" fine.h5
cp "$(model second)" damaged.h5
size=$(stat -c %s damaged.h5) # a third of it is weights, the moments follow
printf '\xff\x00\xff' | dd of=damaged.h5 bs=1 seek=$((size / 6)) conv=notrunc status=none
ranks 3 "$CUPEL" sweep --text text.txt --model fine.h5,damaged.h5 --quantize.bits 8,4 --latency_runs 0 --out failing >out.txt 2>&1 || { cat out.txt >&2; fail "a sweep with failing trials"; }
[[ $(attribute failing/results.h5 stages/sweep/trials_failed) == 2 ]] || { cat out.txt >&2; fail "expected 2 failed trials"; }
h5dump -d /stages/sweep/val_loss failing/results.h5 | tr -d ' \n' | grep -qi 'nan,nan' || fail "failed trials are not NaN"
h5dump -d /stages/sweep/trials failing/results.h5 | grep -q damaged.h5 || fail "the table does not say why"

# Groups of 2 ranks on 4 find what one process finds; a group larger than the world is refused.
four=(--text text.txt --model fine.h5 --prune.sparsity 0.3 --quantize.bits 8,4,3,2 --latency_runs 0 --quiet)
ranks 4 "$CUPEL" sweep "${four[@]}" --group_ranks 2 --out grouped >out.txt 2>&1 || { cat out.txt >&2; fail "groups of 2"; }
"$CUPEL" sweep "${four[@]}" --out alone >out.txt 2>&1 || { cat out.txt >&2; fail "one process"; }
for array in val_loss bytes sparsity tensor_sqnr_db tensor_sparsity; do
    h5diff alone/results.h5 grouped/results.h5 "/stages/sweep/$array" "/stages/sweep/$array" >diff.txt 2>&1 || { cat diff.txt >&2; fail "$array depends on the groups"; }
done
status=0
ranks 2 "$CUPEL" sweep --text text.txt --model fine.h5 --quantize.bits 8,4 --group_ranks 3 --out large --quiet >out.txt 2>&1 || status=$?
((status == 2)) || { cat out.txt >&2; fail "a group larger than the world: status $status"; }

# Where trials do not fit, the sweep says once what would: that much fits, and no more.
tight() { CUPEL_DEVICE=cpu CUPEL_DEVICE_BYTES=1Mi ranks 3 "$CUPEL" sweep --text text.txt --model fine.h5 --quantize.bits 8,4 --micro_batch "$1" --latency_runs 0 --out "tight-$1" >out.txt 2>&1 || { cat out.txt >&2; fail "a sweep in 1 MiB"; }; }
tight 64
[[ $(attribute tight-64/results.h5 stages/sweep/trials_failed) == 2 ]] || { cat out.txt >&2; fail "64 sequences fit in 1 MiB"; }
fitting=$(sed -n 's/^cupel: warning: sweep: trials ran out of memory; what would fit: micro_batch \([0-9]*\)$/\1/p' out.txt)
[[ -n $fitting ]] || { cat out.txt >&2; fail "no advice"; }
tight "$fitting"
[[ $(attribute "tight-$fitting/results.h5" stages/sweep/trials_failed) == 0 ]] || { cat out.txt >&2; fail "micro_batch $fitting does not fit"; }
tight $((fitting + 1))
[[ $(attribute "tight-$((fitting + 1))/results.h5" stages/sweep/trials_failed) == 2 ]] || { cat out.txt >&2; fail "micro_batch $fitting fits, and is not the largest"; }
CUPEL_DEVICE=cpu CUPEL_DEVICE_BYTES=100k ranks 3 "$CUPEL" sweep --text text.txt --model fine.h5 --quantize.bits 8,4 --latency_runs 0 --out none >out.txt 2>&1 || { cat out.txt >&2; fail "a sweep in 100 kB"; }
has out.txt "trials ran out of memory"
! grep -q "would fit" out.txt || { cat out.txt >&2; fail "advice that does not help"; }
