# What NCCL is asked for, asked of a plane over MPI, on 1, 2, 3 and 4 ranks: at once, and as late as may be.
# Refuses a run on fewer ranks than asked for.
. "$CUPEL_SOURCE/tests/support/ranks.sh"

for n in 1 2 3 4; do
    ranks $n "$CUPEL_BUILD/ranks_plane" >"out-$n" 2>"err-$n" || { cat "out-$n" "err-$n" >&2; fail "$n ranks"; }
done
