# A rank that fails, hangs, stops or dies ends all ranks: soon, with one message that names it, and with the right exit status.
# Refuses a process that outlives its job.
. "$CUPEL_SOURCE/tests/support/ranks.sh"

# job N STATUS SECONDS WAY RANK...: runs it; exit status STATUS (nonzero: any but 0), within SECONDS, and nothing of it is left. Output in err.
job() {
    local n=$1 status=$2 seconds=$3
    shift 3
    rm -f pid-*
    local begun=$SECONDS got=0
    ranks "$n" "$CUPEL_BUILD/ranks_failure" "$@" >out 2>err || got=$?
    ((SECONDS - begun <= seconds)) || fail "$* on $n ranks took $((SECONDS - begun)) s, more than $seconds s"
    if [ "$status" = nonzero ]; then
        ((got != 0 && got != 124)) || fail "$* on $n ranks: exit status $got"
    else
        ((got == status)) || { cat err >&2; fail "$* on $n ranks: exit status $got, expected $status"; }
    fi
    local rank pid waited
    for ((rank = 0; rank < n; rank++)); do
        [ -s pid-$rank ] || fail "$*: rank $rank of $n did not start"
        pid=$(<pid-$rank)
        # A killed process may stay in the table for a moment.
        for ((waited = 0; waited < 50; waited++)); do
            case $(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null) in '' | Z | X) break ;; esac
            sleep 0.1
        done
        ((waited < 50)) || fail "$*: rank $rank of $n is still there"
    done
}
# says TEXT: exactly one line of ours, with this text.
says() {
    has err "$1"
    [ "$(grep -c '^cupel:' err)" = 1 ] || { cat err >&2; fail "more than one message"; }
}

job 3 0 30 none 0
! grep -q '^cupel:' err || fail "a message without a failure"
job 1 1 30 input 0
says "cupel: corpus-0.txt: no such file"
for n in 2 4; do
    for rank in 0 1; do
        job $n 1 30 input $rank
        says "cupel: rank $rank: corpus-$rank.txt: no such file"
    done
done
job 4 1 30 input 3 2
says "cupel: rank 2: corpus-2.txt: no such file"
job 3 2 30 usage 2
says "cupel: rank 2: expected an integer on rank 2"
job 2 75 30 stopped 1
says "cupel: rank 1: a signal asked rank 1 to stop"

job 3 1 30 mpi 1
has err "cupel: rank 1: cannot send a value to all ranks: MPI_ERR_ROOT"
job 3 9 30 abort 2
job 3 nonzero 30 kill 1
for rank in 0 1; do
    job 2 nonzero 30 gone $rank
    says "cupel: rank $((1 - rank)) on $(uname -n): the phase: rank $rank of this host has ended"
done
for rank in 0 2; do
    job 3 1 40 freeze $rank
    says ": no progress for 3 s in phase 'the barrier'; rank $rank of this host is stopped"
done
job 2 1 40 loop 1
says ": no progress for 3 s in phase 'the "
