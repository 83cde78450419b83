# A plan says what a run then does and takes: device memory within 1 % of the peak measured, trials, what is done.
# It touches nothing.
# Refuses a plan that promises what the run refuses.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"

tiny_text text.txt
tiny_study job.yaml

. "$CUPEL_SOURCE/tests/jobs/plan_peak.sh"
device=cpu within=1

# One stage at a time: what came before is done in a process of its own.
tiny_job job.yaml
peak fp16 1 teacher
peak fp32 1 teacher --set teacher.precision=fp32
peak tree 2 teacher --set teacher.reduction=tree --set teacher.recompute=gelu
peak tree-wide 4 teacher --set teacher.reduction=tree --set teacher.width=64
peak replicated 2 teacher --set teacher.optimizer=replicated --set teacher.recompute=block --set teacher.micro_batch=4
peak sharded 3 teacher --set teacher.width=64
cat >>job.yaml <<'YAML'
  - distill: {name: student, teacher: teacher, layers: 1, steps: 4, micro_batch: 2, global_batch: 16, precision: bf16, warmup: 0}
YAML
peak fp16 1 student
cat >>job.yaml <<'YAML'
  - prune: {name: pruned, model: teacher, sparsity: 0.5, finetune_steps: 3, micro_batch: 2, global_batch: 16, lr: 1e-4, warmup: 0}
YAML
peak fp16 2 pruned
# All in one process: a stage's peak is its own, and not that of the larger one before it.
peak whole-student 1 student --set student.steps=3 --set teacher.layers=4
peak whole-pruned 1 pruned --set pruned.finetune_steps=2 --set pruned.micro_batch=1 --set pruned.recompute=block
# So many weights that a sample of them says where to look: the selection is the most.
peak selected 1 pruned --set pruned.finetune_steps=0 --set pruned.micro_batch=1 --set teacher.steps=1 --set teacher.width=512
# With the hidden-state loss, with and without a projection.
peak hidden-equal 1 student --set student.hidden_weight=1
peak hidden-narrow 2 student --set student.hidden_weight=1 --set student.start=scratch --set student.width=48
# A teacher so much larger that its weights on their way to the device are the most.
peak hidden-upload 2 student --set student.hidden_weight=1 --set student.start=scratch --set student.width=256 --set teacher.width=512

# What is done, what is left, and that nothing is made or changed.
tiny_study job.yaml
"$CUPEL" plan job.yaml --list >plan.txt 2>err || { cat err >&2; fail "plan"; }
[ ! -e tiny ] || fail "plan made the study's folder"
has plan.txt " tiny: 6 stages on 1 rank; 0 done already in tiny"
has plan.txt "12 trials to run" # 2 models x 2 sparsities x 3 bits and the unchanged model, which is one of them
[ "$(grep -c '^ grid: to run ' plan.txt)" = 12 ] || fail "--list does not name 12 trials"
[ "$(grep -c '^ grid: shared ' plan.txt)" = 1 ] || fail "--list does not name the trial that is the unchanged model"
"$CUPEL" run job.yaml --quiet >out 2>err || { cat err >&2; fail "run"; }
find tiny -type f -newermt 1970-01-01 -printf '%p %s %T@\n' | sort >before
"$CUPEL" plan job.yaml --list >plan.txt 2>err || { cat err >&2; fail "plan of a finished study"; }
find tiny -type f -printf '%p %s %T@\n' | sort >after
cmp before after || fail "plan changed the study's folder"
has plan.txt "6 stages on 1 rank; 6 done already in tiny"
has plan.txt "left to do: 0 FLOP"
! grep -q 'to run' plan.txt || fail "a finished study has something to run"
"$CUPEL" plan job.yaml --set pruned.sparsity=0.25 >plan.txt 2>err || fail "plan of a changed study"
has plan.txt "3 done already" # teacher, student, grid; int4 and measured stand on pruned
rm tiny/trials/"$(ls tiny/trials | head -n 1)" tiny/stages/grid.h5
"$CUPEL" plan job.yaml >plan.txt 2>err || fail "plan with a trial lost"
has plan.txt " 1 trial to run"

# What the run would refuse, the plan refuses.
refused() {
    local status=$1 text=$2
    shift 2
    local got=0
    "$CUPEL" plan job.yaml --out elsewhere "$@" >out 2>err || got=$?
    ((got == status)) || { cat out err >&2; fail "plan $*: exit status $got, expected $status"; }
    has err "$text"
    [ ! -e elsewhere ] || fail "plan $* made a folder"
}
refused 2 "micro-batches a step are fewer than 9 ranks" --ranks 9
refused 2 "power of two of ranks" --ranks 3 --set teacher.reduction=tree
refused 2 "did you mean --list" --lst 1
refused 2 "expected a number of ranks" --ranks none
refused 2 "group_ranks" --set grid.group_ranks=2
refused 1 "tokens are missing" --set teacher.global_batch=100000
refused 1 "nothing.txt" --set corpus.train=nothing.txt
"$CUPEL" plan >out 2>err && fail "plan without a job file"
has err "expected a job file"
"$CUPEL" plan --help >out || fail "plan --help"
has out "--ranks N"
