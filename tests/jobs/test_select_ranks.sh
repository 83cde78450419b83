# Exact pruning on 1, 2, 3 and 4 ranks: each mask is the oracle's, and all of them are the same on any number of ranks.
# Refuses a run that gives no masks to compare.
. "$CUPEL_SOURCE/tests/support/ranks.sh"
for n in 1 2 3 4; do
    ranks $n "$CUPEL_BUILD/ranks_select" >"out-$n" 2>"err-$n" || { cat "out-$n" "err-$n" >&2; fail "$n ranks"; }
    has "out-$n" "masks "
    [ "$(grep '^masks ' out-1)" = "$(grep '^masks ' out-$n)" ] || fail "1 and $n ranks give different masks"
done
