# The tests of comm on 1, 2, 3 and 4 ranks; the bits of a tree sum over the same micro-batches are the same for 1, 2 and 4.
# Refuses a run that gives no bits to compare.
. "$CUPEL_SOURCE/tests/support/ranks.sh"

for n in 1 2 3 4; do
    rm -f counter-*
    ranks $n "$CUPEL_BUILD/ranks_comm" >"out-$n" 2>"err-$n" || { cat "out-$n" "err-$n" >&2; fail "$n ranks"; }
    has "out-$n" "sum bits "
done
for n in 2 4; do
    [ "$(grep 'sum bits' out-1)" = "$(grep 'sum bits' out-$n)" ] || fail "1 and $n ranks sum to different bits"
done

# An MPI without one-sided calls, as Debian's Open MPI is between hosts: rank 0 serves the counters.
if mpirun --version 2>&1 | grep -q 'Open MPI'; then
    OMPI_MCA_osc='^sm,rdma,ucx,pt2pt,monitoring' ranks 4 "$CUPEL_BUILD/ranks_comm" >out-served 2>err-served || { cat out-served err-served >&2; fail "served counters"; }
    has out-served "one-sided: 0"
fi
