# Sourced by the test scripts: starts programs on several ranks, and says what a script found.
# Refuses to wait for ever: every program has a time limit (RANKS_TIMEOUT seconds, 120), then all its ranks are killed.

# Open MPI: root must be allowed, a machine without ssh must not be asked for it, and ranks that share memory in a container may not use CMA.
if ((EUID == 0)); then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent=false
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none # Open MPI 5
# Nodes of the Slurm tests may be one machine, whose own address Open MPI 5 takes for unreachable over TCP when it asks netlink.
export OMPI_MCA_reachable=weighted

# Where there are GPUs, tests of more ranks than those run all the same.
export CUPEL_RANKS_PER_GPU=${CUPEL_RANKS_PER_GPU:-16}

# A rank that waits gives its core away: other tests, or more ranks than cores, make that several times faster.
export OMPI_MCA_mpi_yield_when_idle=1
# Sanitizer builds: MPI libraries have no frame pointers, and lsan.supp needs whole stacks to know them by.
[ -z "${CUPEL_SANITIZE:-}" ] || export ASAN_OPTIONS="${ASAN_OPTIONS:-}:fast_unwind_on_malloc=0"

# ranks N PROGRAM [ARG...]: exit status of mpirun, 124 when the time limit ended it.
ranks() {
    local n=$1
    shift
    timeout -k 5 "${RANKS_TIMEOUT:-120}" mpirun -n "$n" "$@" </dev/null
}

# fail TEXT: ends the test as failed.   skip TEXT: as skipped.   has FILE TEXT: fails unless the file contains the text.
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
skip() {
    echo "SKIPPED: $*" >&2
    exit 77
}
has() {
    grep -qF -- "$2" "$1" || { cat "$1" >&2; fail "$1 does not contain: $2"; }
}
