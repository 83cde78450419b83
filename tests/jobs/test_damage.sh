# Damaged files: a truncated, flipped or foreign newest checkpoint is passed over for the one before and made again, to the bit; a damaged model, shard
# or job file is refused. Refuses messages that do not name the file.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml

# One message with that text and that status, of a single process or of `on 2` ranks.
start=("$CUPEL")
on() { start=(ranks "$1" "$CUPEL"); }
refused() { # refused STATUS TEXT ARG...
    local want=$1 text=$2 status=0
    shift 2
    "${start[@]}" "$@" >out.txt 2>&1 || status=$?
    start=("$CUPEL")
    ((status == want)) || { cat out.txt >&2; fail "status $status, expected $want: $*"; }
    has out.txt "$text"
    (($(grep -c '^cupel: ' out.txt) == 1)) || { cat out.txt >&2; fail "more than one message: $*"; }
}
spoil() { # spoil HOW FILE
    local size
    size=$(stat -c %s "$2")
    case $1 in
    truncate) truncate -s $((size - 1000)) "$2" ;;
    flip) head -c 1 "$2" | cmp -s - <(tail -c +$((size / 6 + 1)) "$2" | head -c 1) && fail "choose another byte"
        printf '%b' "\\x$(printf %02x $((255 - $(od -An -tu1 -j $((size / 6)) -N 1 "$2"))))" | dd of="$2" bs=1 seek=$((size / 6)) conv=notrunc status=none ;;
    garbage) echo "not HDF5 at all" >"$2" ;;
    empty) : >"$2" ;;
    esac
}

# A run that always ends at step 10, for its gradients are no numbers any more: checkpoints of step 4 and 8.
args=(run job.yaml --out run --set teacher.steps=12 --set run.checkpoint_every=4 --set teacher.loss_scaling=fixed --set teacher.inject_step=9 --set teacher.inject_count=9
    --set teacher.loss_scale=1 --set teacher.overflow_limit=2 --set run.keep_checkpoints=5)
stuck="overflow on 2 steps in a row"
on 2
refused 1 "$stuck" "${args[@]}" --quiet
newest=$(ls run/checkpoints/*/step-8.h5) && before=$(ls run/checkpoints/*/step-4.h5) || fail "expected checkpoints of steps 4 and 8"
cp "$newest" good-8.h5
for damage in truncate flip garbage empty; do
    spoil $damage "$newest"
    status=0
    ranks 2 "$CUPEL" "${args[@]}" >out.txt 2>&1 || status=$?
    ((status == 1)) || { cat out.txt >&2; fail "$damage: status $status"; }
    has out.txt "warning: passed over a damaged checkpoint: $newest"
    has out.txt "resuming from step 4"
    has out.txt "$stuck"
    same good-8.h5 "$newest" param m v metrics_step
done
# No checkpoint is whole: from the start, to the same bits.
spoil flip "$newest"
spoil truncate "$before"
ranks 2 "$CUPEL" "${args[@]}" >out.txt 2>&1
has out.txt "$stuck"
same good-8.h5 "$newest" param m v metrics_step

# A model with a flipped bit is no model, and says what its name is; nothing of the damaged study is lost.
"$CUPEL" run job.yaml --out study --quiet >out.txt 2>&1 || { cat out.txt >&2; fail "good run"; }
cp "$(model study)" flipped.h5
spoil flip flipped.h5
on 2
refused 1 flipped.h5 prune --text text.txt --model flipped.h5 --out pruned --quiet
[[ ! -e pruned/results.h5 ]] || fail "a stage that failed left results"

# A study whose model was lost makes it again; one whose results are damaged puts them together again.
cp "$(model study)" teacher.h5
rm "$(model study)"
"$CUPEL" run job.yaml --out study --quiet >out.txt 2>&1 || { cat out.txt >&2; fail "run without the model"; }
same teacher.h5 "$(model study)" param m v
spoil truncate study/results.h5
"$CUPEL" run job.yaml --out study >out.txt 2>&1 || { cat out.txt >&2; fail "run with damaged results"; }
has out.txt "nothing to do"
h5dump -n study/results.h5 >names.txt || fail "results.h5 is still damaged"
spoil flip study/stages/teacher.h5
"$CUPEL" run job.yaml --out study >out.txt 2>&1 || { cat out.txt >&2; fail "run with a damaged record"; }
h5dump study/results.h5 >names.txt || fail "results.h5 is damaged"

# Job files and settings: refused before anything is made.
sed 's/layers: 2/layrs: 2/' job.yaml >bad.yaml
on 2
refused 2 "bad.yaml:6:" run bad.yaml --out bad
has out.txt "did you mean 'layers'"
sed 's/steps: 6/steps: six/' job.yaml >bad.yaml
refused 2 "expected an integer" run bad.yaml --out bad
head -c 120 job.yaml >bad.yaml
refused 2 "bad.yaml:" run bad.yaml --out bad
head -c 300 /dev/urandom >bad.yaml
refused 2 "bad.yaml" run bad.yaml --out bad
: >bad.yaml
refused 2 "bad.yaml" run bad.yaml --out bad
refused 1 "nowhere.yaml" run nowhere.yaml --out bad
refused 1 "nowhere.txt" run job.yaml --out bad --set corpus.train=nowhere.txt
refused 2 "global_batch: 16 is not a multiple of micro_batch 3" run job.yaml --out bad --set teacher.micro_batch=3
refused 2 "did you mean 'teacher'" run job.yaml --out bad --set teachr.steps=3
refused 2 "did you mean 'steps'" run job.yaml --out bad --set teacher.stesp=3
refused 2 "expected PATH=VALUE" run job.yaml --out bad --set teacher.steps
refused 2 "--set teacher.steps" run job.yaml --out bad --set teacher.steps=many
refused 2 "expected a power of two" run job.yaml --out bad --set teacher.loss_scale=1000
refused 2 "unknown option --stepps" train --text text.txt --stepps 3 --out bad
# What depends on the text and the ranks, too.
head -c 600 text.txt >short.txt # 540 tokens after the held-out ones; 16 sequences of 32 need 513
on 2
refused 1 "540 tokens, a global batch of 32 sequences of 32 needs 1025: 485 tokens are missing" run job.yaml --out bad --set corpus.train=short.txt --set teacher.global_batch=32
refused 1 "tokens are missing" run job.yaml --out bad --set corpus.train=short.txt --set corpus.held_out=0.01
on 2
refused 2 "1 micro-batches a step are fewer than 2 ranks" run job.yaml --out bad --set teacher.micro_batch=16
refused 2 "no tensor 'wtf'" run job.yaml --out bad --set teacher.inject_step=5 --set teacher.inject_tensor=wtf
[[ ! -e bad ]] || fail "a job that was refused made its folder"

# Token shards: a header that promises more than is there.
"$CUPEL" prepare text.txt --to shard --format llmc >out.txt 2>&1 || { cat out.txt >&2; fail "prepare"; }
truncate -s -10 shard_000000.bin
refused 1 "shard_000000.bin" run job.yaml --out bad --set corpus.train=shard_000000.bin
printf 'not HDF5' >shard.h5
refused 1 "shard.h5" run job.yaml --out bad --set corpus.train=shard.h5
: >empty.txt
refused 1 "empty.txt: is empty" run job.yaml --out bad --set corpus.train=empty.txt
[[ ! -e bad ]] || fail "a job that was refused made its folder"
exit 0
