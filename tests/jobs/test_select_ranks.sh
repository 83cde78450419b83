# Exact pruning on 1, 2, 3 and 4 ranks: each mask is the oracle's, and all of them are the same on any number of ranks.
# Refuses a run that gives no masks to compare.
. "$CUPEL_SOURCE/tests/support/ranks.sh"
export RANKS_TIMEOUT=400 # on a GPU that others use as well
for program in ranks_select ranks_select_window; do
    for n in 1 2 3 4; do
        out=$program-$n
        ranks $n "$CUPEL_BUILD/$program" >"$out" 2>"$out.err" || { cat "$out" "$out.err" >&2; fail "$program on $n ranks"; }
        has "$out" "masks "
        [ "$(grep '^masks ' "$program-1")" = "$(grep '^masks ' "$out")" ] || fail "$program: 1 and $n ranks give different masks"
    done
done
