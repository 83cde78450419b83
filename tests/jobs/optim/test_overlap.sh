# A gradient summed over 1 to 4 ranks beside the backward pass gives the bits of one summed afterwards, skipped steps included.
# Refuses a run in which no step was skipped, or all were.
. "$CUPEL_SOURCE/tests/support/ranks.sh"

for n in 1 2 3 4; do
    ranks $n "$CUPEL_BUILD/ranks_overlap" >"out-$n" 2>"err-$n" || { cat "out-$n" "err-$n" >&2; fail "$n ranks"; }
done
