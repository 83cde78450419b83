# cupel bench: each part ends well on one rank and on two, prints the rows it promises with figures that belong together, as a table and as JSON.
# Refuses what it does not know, with the nearest right word.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
export COLUMNS=1000 # no column is left out
small=(--layers 2 --heads 2 --width 16 --context 16 --micro-batch 2 --vocab 40 --seconds 0 --threads 1 --steps 3
    --millions 0.02 --tensors 3 --loss-rows 4 --loss-vocab 50 --largest 256Ki)
bench() { # bench ARGUMENT...: output in `out`
    "$CUPEL" bench "$@" "${small[@]}" >out 2>err || { cat err >&2; fail "bench $*: exit status $?"; }
}
# rows NAME...: each is a row of the table, once.
rows() {
    local name
    for name in "$@"; do [ "$(grep -c "^ $name  " out)" = 1 ] || { cat out >&2; fail "not one row '$name'"; }; done
}
# holds NAME CONDITION: of the JSON row NAME; members are variables of awk, "" for null.
holds() {
    local row
    row=$(grep -F "\"operation\":\"$1\"" out | head -n 1)
    [ -n "$row" ] || { cat out >&2; fail "no row '$1'"; }
    local members
    members=$(printf '%s\n' "$row" | tr -d '{}' | tr ',' '\n' | sed -n 's/^"\([a-z_]*\)":\([-+0-9.e]*\|null\)$/\1=\2/p' | sed 's/=null$/=""/' | tr '\n' ';')
    awk "BEGIN { $members exit !($2) }" || { printf '%s\n' "$row" >&2; fail "$1: not so: $2"; }
}
# json ROWS: so many lines at least, each an object with balanced quotes and no bare nan or inf.
json() {
    awk -v least="$1" '!/^\{"[^{}]*\}$/ || gsub(/"/, "\"") % 2 || /:-?(nan|inf)/ || /,,|,\}|\{,/ { bad = 1; print } END { exit bad || NR < least }' out >wrong || { cat wrong >&2; fail "JSON"; }
}

bench ops
rows 'limit: copy, read and written' 'limit: matrix product fp32' 'linear qkv' 'linear head: d weight' attention LayerNorm 'cross-entropy and gradient'
! grep -q 'training step  ' out || fail "bench ops measures a step too"
bench memory
rows AdamW 'gradient scan' 'select: histogram' 'select: window' 'quantize 4 bits, channel'

bench train --accumulate 2 --profile
rows 'forward pass and loss' 'training step' 'a step with no other before or after' 'overflow consensus, clip and scaler' 'device memory' \
    'step: linear_fwd' 'step: attention_bwd' 'step: adamw' 'step: grad_scan' 'step: between operations' 'step: all of it'
grep -q '^ training step .* 3$' out || fail "the step is not the median of 3"
grep -q '^ step: linear_fwd  *14 calls' out && grep -q '^ step: linear_gelu_fwd  *4 calls' out || fail "a step of 2 micro-batches of 2 layers does not have 18 products"
! grep -q '^ linear qkv' out || fail "bench train measures operations too"
bench train --profile --warm-up 2 --json
json 20
holds 'training step' 'ms > 0 && ms_best <= ms && ms <= ms_worst && runs == 3 && tokens_per_s > 0 && flop_per_s > 0 && percent_of_limit > 0'
holds 'training step' 'tokens_per_s * ms > 31990 && tokens_per_s * ms < 32010' # 2 x 16 tokens
holds 'overflow consensus, clip and scaler' 'percent_of_step > 0 && ms > 0 && percent_of_step < 100'
library=0 # a GPU's library multiplies with a workspace of 64 MiB
[ "${CUPEL_DEVICE:-}" != cuda ] || library=$((64 << 20))
holds 'device memory' "bytes_held - $library > 100000 && bytes_held - $library < 10000000 && ms == \"\""
holds 'step: all of it' 'percent_of_step == 100'
sum=$(grep -o '"operation":"step: [^}]*' out | grep -v 'all of it' | sed 's/.*"percent_of_step":\([^,]*\).*/\1/' | awk '{ s += $1 } END { print s }')
awk "BEGIN { exit !($sum > 50 && $sum < 200) }" || fail "the operations of a step are $sum % of it"

bench compress
rows 'exact global threshold and mask' 'apply mask' 'fake-quantize int4 g128 + error' 'the same, tensor by tensor' 'cast fp32 to bf16' 'distillation loss and gradient, bf16'
bench compress --json --sparsity 0
json 11
# 20,000 weights in 3 tensors of whole rows of 1024: 6 rows each. The mask of 9 bytes a weight at the speed of the copy is the floor.
holds 'exact global threshold and mask' 'ms > 0 && byte_per_s * ms > 0.999 * 9 * 18432 * 1000 && byte_per_s * ms < 1.001 * 9 * 18432 * 1000'
holds 'exact global threshold and mask' '(ms_floor / ms * 100 - percent_of_limit) ^ 2 < 1e-4 * percent_of_limit ^ 2'

bench comm
rows 'overflow flag, or over the ranks' 'word of a step, or over the ranks' barrier
[ "$(grep -c '^ reduce-scatter fp32 ' out)" = 3 ] && [ "$(grep -c '^ all-gather  ' out)" = 3 ] && [ "$(grep -c '^ all-gather of unequal parts ' out)" = 3 ] || fail "not 3 sizes up to 256 KiB"
ranks 2 "$CUPEL" bench comm "${small[@]}" --json >out 2>err || { cat err >&2; fail "bench comm on 2 ranks"; }
json 11
holds all-gather 'bus_byte_per_s * ms > 0.999 * 2048 * 1000 && bus_byte_per_s * ms < 1.001 * 2048 * 1000' # half of 4 KiB

for precision in fp32 bf16 fp16; do
    bench --fusion --precision $precision --json
    json 11
    for name in 'linear + bias + residual' 'linear + bias + GELU' "linear d input x GELU'" 'attention from packed q, k, v' 'attention backward into packed' \
        'cross-entropy, gradient over logits' 'AdamW, mask and cast' 'AdamW, unscale and clip'; do
        holds "$name" 'ms > 0 && ms_separate > 0 && bytes_not_moved > 0 && (ms_separate - ms - ms_saved) ^ 2 < 1e-8 * (1 + ms ^ 2)'
    done
    ! grep -q '"operation":"AdamW",' out || fail "bench --fusion measures everything"
done

bench all --json --precision fp16
json 60
awk '/"operation"/ && !/"operation":"device (memory|idle between steps)"/ && !/"ms":[0-9.e+-]*[1-9]/ { bad = 1; print }
    /"limit: / && /"percent_of_limit":null/ { limits++ }
    /"(flop|byte)_per_s":[0-9]/ && !/"limit: / && !/"percent_of_limit":[0-9.e+-]+,/ { bad = 1; print }
    /"training step"/ && /"tokens_per_s":[0-9]/ { steps++ }
    END { exit bad || limits != 3 || steps != 1 }' out >wrong || { cat wrong >&2; fail "bench all --json"; }
ranks 2 "$CUPEL" bench train "${small[@]}" >out 2>err || { cat err >&2; fail "bench train on 2 ranks"; }
has out "all ranks"
rows 'training step' 'overflow consensus, clip and scaler'

refused() { # refused TEXT ARGUMENT...: exit status 2, and one line that has the text.
    local text=$1 got=0
    shift
    "$CUPEL" bench "$@" >out 2>err || got=$?
    ((got == 2)) || { cat err >&2; fail "bench $*: exit status $got, expected 2"; }
    has err "$text"
    [ "$(wc -l <err)" = 1 ] || { cat err >&2; fail "bench $*: more than one line"; }
}
refused "did you mean 'train'?" trian
refused "did you mean 'compress'?" compres
refused "expected ops, memory, train, compress, comm or all" everything
refused "did you mean --width?" --widht 3
refused "did you mean --accumulate?" train --acumulate 3
refused "did you mean --profile?" train --profil
refused "width" --width 7 --heads 2
refused "unexpected argument 'memory'" ops memory
refused "bench train --profile" comm --profile
refused "--steps" train --steps 0
refused "--warm-up" train --warm-up 1 # the first step is not yet a graph
refused "--sparsity" compress --sparsity 2
refused "--largest" comm --largest 1
exit 0
