# The same bits: reduction tree on 1, 2, 4 ranks; ZeRO-1 and replicated; every kind of recomputation; 1 and 2 threads; in every precision.
# Refuses tolerances: h5diff of parameters, moments and losses.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml
run() { # run DIR RANKS [SETTING]...
    local dir=$1 n=$2 sets=()
    shift 2
    for s in "$@"; do sets+=(--set "$s"); done
    ranks "$n" "$CUPEL" run job.yaml --out "$dir" --quiet "${sets[@]}" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir"; }
}
compare() { same "$(model "$1")" "$(model "$2")" param m v metrics_step metrics_eval; }

for p in fp32 bf16 fp16; do
    for n in 1 2 4; do run tree-$p-$n $n teacher.reduction=tree teacher.precision=$p; done
    compare tree-$p-1 tree-$p-2
    compare tree-$p-1 tree-$p-4
    for n in 2 3; do
        run sharded-$p-$n $n teacher.precision=$p
        run replicated-$p-$n $n teacher.precision=$p teacher.optimizer=replicated
        compare sharded-$p-$n replicated-$p-$n
    done
    for r in gelu block; do
        run $r-$p 2 teacher.precision=$p teacher.recompute=$r
        compare sharded-$p-2 $r-$p
    done
done
run threads1 1 run.threads=1
run threads2 1 run.threads=2
compare threads1 threads2
# The comparison can fail: another seed gives other bits.
run other 1 seed=8
h5diff "$(model threads1)" "$(model other)" /param /param >diff.txt 2>&1 && fail "two seeds gave the same weights"
exit 0
