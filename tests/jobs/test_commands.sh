# Every command explains itself, refuses what it does not know with the nearest right word and exit status 2;
# prepare, report and info do what they say, on one rank and on two (bench: test_bench.sh).
# Refuses messages of more than one line.
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"

commands='run plan train distill prune quantize sweep eval prepare report bench info'
"$CUPEL" --help >help.txt || fail "cupel --help"
for command in $commands; do
    grep -q "^  $command " help.txt || fail "cupel --help does not name $command"
    "$CUPEL" "$command" --help >out 2>err || fail "$command --help: exit status $?"
    has out "cupel $command"
    [ ! -s err ] || { cat err >&2; fail "$command --help writes to stderr"; }
done

# refused STATUS TEXT ARGUMENT...: that exit status, and one line that has the text.
refused() {
    local status=$1 text=$2 got=0
    shift 2
    "$CUPEL" "$@" >out 2>err || got=$?
    ((got == status)) || { cat err >&2; fail "cupel $*: exit status $got, expected $status"; }
    has err "$text"
    [ "$(wc -l <err)" = 1 ] || { cat err >&2; fail "cupel $*: more than one line"; }
}
refused 2 "did you mean 'report'?" reprot
refused 2 "did you mean --rows?" report --row 3 .
refused 2 "expected one study folder" report
refused 2 "--rows: expected" report --rows many .
refused 2 "--rows needs a value" report . --rows
refused 1 "nowhere: No such file" report nowhere
refused 1 "no results yet" report .
refused 2 "unknown option --verbose" info --verbose
refused 2 "unexpected argument 'more'" info more
refused 2 "did you mean --format?" prepare --formt h5 a.txt
refused 2 "expected --to PREFIX" prepare a.txt
refused 2 "expected text files" prepare --to b
refused 2 "expected one of h5, llmc, nanogpt" prepare a.txt --to b --format csv
refused 1 "a.txt" prepare a.txt --to b

# info
"$CUPEL" info >out 2>err || fail "info"
device=('matrix library' 'instruction set' 'bf16 products' threads)
[ "${CUPEL_DEVICE:-}" != cuda ] || device=('GPU memory' 'GPU 0' cuBLASLt)
for key in cupel revision build MPI HDF5 "${device[@]}" energy CUDA NCCL exchange 'rank 0'; do
    grep -q "^ $key  *[^ ]" out || { cat out >&2; fail "info does not say: $key"; }
done
ranks 2 "$CUPEL" info >out 2>err || fail "info on 2 ranks"
has out "2 on "
grep -Eq '^ (ranks 0 to 1|rank 1) ' out || { cat out >&2; fail "info does not say what rank 1 computes on"; } # in one line where it is the same
[ "$(grep -c '^ cupel ' out)" = 1 ] || fail "info of 2 ranks is printed more than once"

# prepare: shards of every format hold the text's tokens, so that a training stage on them gives the same bits as on the text.
tiny_text text.txt
tiny_job job.yaml
bytes=$(wc -c <text.txt)
for format in h5 llmc nanogpt; do
    "$CUPEL" prepare text.txt --to "$format" --format $format --shard-tokens 5000 >out 2>err ||
        { cat err >&2; fail "prepare --format $format"; }
    has err "$bytes tokens of a vocabulary of 256"
    files=("$format"_*)
    ((${#files[@]} == (bytes + 4999) / 5000)) || fail "prepare --format $format made ${#files[@]} shards of $bytes tokens"
done
ranks 2 "$CUPEL" prepare text.txt --to two 2>err || fail "prepare on 2 ranks"
"$CUPEL" prepare text.txt --to one 2>err || fail "prepare into one shard"
cmp two_000000.h5 one_000000.h5 || fail "2 ranks prepare other bytes than one"
"$CUPEL" run job.yaml --quiet --out text >out 2>err || { cat err >&2; fail "run on text"; }
shards=$(printf '%s,' nanogpt_*.bin)
"$CUPEL" run job.yaml --quiet --out shards --set corpus.train="${shards%,}" --set corpus.vocab=256 >out 2>err ||
    { cat err >&2; fail "run on shards"; }
same "$(model text)" "$(model shards)" param m v

# report: what run printed, again.
"$CUPEL" report text >out 2>err || { cat err >&2; fail "report"; }
has out "teacher  train"
has out "nat/token"
"$CUPEL" report text/results.h5 >again || fail "report of the file itself"
diff out again || fail "report of a folder and of its file differ"
ranks 2 "$CUPEL" report text >again || fail "report on 2 ranks"
diff out again || fail "report on 2 ranks differs"
