# On a GPU a plan's bytes are within 5 % of the peak of a run, by kind of stage, precision, recomputation and attention; out of memory
# there too says what would fit.
# Refuses to pass without a GPU: it is skipped and says so.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
. "$CUPEL_SOURCE/tests/jobs/plan_peak.sh"
"$CUPEL" info >info.txt || fail "info"
grep -q '^ GPU 0 ' info.txt || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
device=cuda within=5
tiny_text text.txt 4000

# Large enough that the model, and attention's workspace, are most of it.
cat >job.yaml <<'YAML'
name: large
seed: 7
corpus: {train: [text.txt], held_out: 0.2}
run: {checkpoint_every: 0}
stages:
  - train: {name: teacher, layers: 4, heads: 8, width: 512, context: 512, steps: 2, micro_batch: 8, global_batch: 16, precision: bf16, warmup: 0, eval_every: 0}
YAML
peak bf16 1 teacher
peak gelu 1 teacher --set teacher.recompute=gelu
peak block 1 teacher --set teacher.recompute=block
for p in fp16 fp32 tf32; do peak $p 1 teacher --set teacher.precision=$p; done
CUPEL_ATTENTION=own peak own 1 teacher
peak shared 2 teacher --set run.ranks_per_gpu=2 --set teacher.reduction=tree
cat >>job.yaml <<'YAML'
  - distill: {name: student, teacher: teacher, layers: 2, steps: 2, micro_batch: 4, global_batch: 8, precision: bf16, warmup: 0, eval_every: 0}
  - prune: {name: pruned, model: teacher, sparsity: 0.5, finetune_steps: 2, micro_batch: 4, global_batch: 8, precision: bf16, warmup: 0, eval_every: 0}
  - eval: {name: measured, model: pruned, precision: bf16, micro_batch: 8, latency_runs: 3}
YAML
# All in one process: a stage's peak is its own, and not that of the larger one before it.
peak whole 1 student
for stage in teacher pruned measured; do
    expected=$(planned $stage plan.txt) measured=$(attribute whole/results.h5 "/stages/$stage/device_bytes_peak")
    ((expected * 100 <= measured * 105 && expected * 100 >= measured * 95)) || fail "$stage: planned $expected bytes, measured $measured"
done

status=0
CUPEL_DEVICE_BYTES=600Mi "$CUPEL" run job.yaml --quiet --out small --set run.device=cuda --set teacher.micro_batch=16 >out.txt 2>&1 || status=$?
((status == 1)) || { cat out.txt >&2; fail "a model that does not fit: exit status $status"; }
has out.txt "what would fit: micro_batch "
advice=$(sed -n 's/.*what would fit: micro_batch \([0-9]*\) with recompute \([a-z]*\).*/\1 \2/p' out.txt)
read -r micro_batch recompute <<<"$advice"
CUPEL_DEVICE_BYTES=600Mi "$CUPEL" run job.yaml --quiet --out small --set run.device=cuda --set teacher.micro_batch="$micro_batch" --set teacher.recompute="$recompute" >out.txt 2>&1 ||
    { cat out.txt >&2; fail "$advice does not fit"; }
exit 0
