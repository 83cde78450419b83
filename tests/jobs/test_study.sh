# A study of every kind of stage runs to its end; run again it does nothing; a changed option runs what depends on it and nothing else; results.h5 holds it all.
# Refuses results that a dump cannot read.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_study job.yaml
ranks 2 "$CUPEL" run job.yaml --out study >out.txt 2>&1 || { cat out.txt >&2; fail "first run"; }
has out.txt "6 of 6 stages ran"
h5dump -n study/results.h5 >names.txt || fail "h5dump cannot read results.h5"
for name in corpus stages/teacher/loss stages/teacher/val_loss stages/student/hard_loss stages/pruned/tensor_sparsity stages/int4/entropy stages/grid/val_loss \
    stages/grid/pareto stages/grid/trials stages/grid/tensor_sqnr_db stages/teacher/overflow_events; do
    has names.txt "/$name"
done
[[ $(attribute study/results.h5 stages/grid/trials_failed) == 0 ]] || fail "trials failed"
[[ $(attribute study/results.h5 stages/pruned/removed_weights) == $(($(attribute study/results.h5 stages/pruned/prunable_weights) / 2)) ]] || fail "not exactly half was removed"

ranks 2 "$CUPEL" run job.yaml --out study >out.txt 2>&1 || { cat out.txt >&2; fail "second run"; }
has out.txt "nothing to do"

ranks 1 "$CUPEL" run job.yaml --out study --set student.steps=5 >out.txt 2>&1 || { cat out.txt >&2; fail "changed student"; }
has out.txt "teacher: already done"
has out.txt "pruned: already done"
has out.txt "2 of 6 stages ran"

# The same weights whatever the number of ranks: exact mask, same evaluation.
for n in 1 2 3 4; do
    ranks $n "$CUPEL" prune --text text.txt --model study/$(attribute study/results.h5 stages/teacher/model) --sparsity 0.37 --out prune$n --quiet --corpus.held_out 0.1 >out.txt 2>&1 ||
        { cat out.txt >&2; fail "prune on $n ranks"; }
    same "$(model prune1)" "$(model prune$n)" param mask
    [[ $(attribute prune$n/results.h5 stages/prune/val_loss) == $(attribute prune1/results.h5 stages/prune/val_loss) ]] || fail "validation loss depends on the ranks"
done

# Token shards of the same text train to the same weights as the text.
for format in h5 llmc nanogpt; do
    "$CUPEL" prepare text.txt --to shard-$format --format $format >out.txt 2>&1 || { cat out.txt >&2; fail "prepare $format"; }
    shards=$(ls shard-$format* | paste -sd,)
    "$CUPEL" run job.yaml --out from-$format --quiet --set "corpus.train=$shards" --set corpus.vocab=256 >out.txt 2>&1 || { cat out.txt >&2; fail "train from $format"; }
done
"$CUPEL" run job.yaml --out from-text --quiet >out.txt 2>&1 || { cat out.txt >&2; fail "train from text"; }
for format in h5 llmc nanogpt; do
    same "from-text/$(attribute from-text/results.h5 stages/teacher/model)" "from-$format/$(attribute from-$format/results.h5 stages/teacher/model)" param m v
done
