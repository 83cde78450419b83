# Sourced by the tests of cupel plan: what it says of a stage's device memory beside the peak of a run.
# Refuses a plan that is further off than `within` percent on `device`, which the test sets.

# planned STAGE FILE: the last column of the last table that has the stage: bytes of device memory.
planned() { awk -v stage="$1" '$1 == stage { v = $NF } END { print v }' "$2"; }

# peak LABEL RANKS STAGE OPTION...: what plan says of STAGE beside the peak of a run into folder LABEL.
peak() {
    local label=$1 n=$2 stage=$3 expected measured
    shift 3
    "$CUPEL" plan job.yaml --out "$label" --ranks "$n" --set run.device=$device "$@" >plan.txt 2>err || { cat err >&2; fail "$label: plan"; }
    expected=$(planned "$stage" plan.txt)
    ranks "$n" "$CUPEL" run job.yaml --out "$label" --quiet --set run.device=$device "$@" >out 2>err || { cat err >&2; fail "$label: run"; }
    measured=$(attribute "$label/results.h5" "/stages/$stage/device_bytes_peak")
    [[ $expected =~ ^[0-9]+$ && $measured =~ ^[0-9]+$ ]] || fail "$label: planned '$expected', measured '$measured'"
    ((expected * 100 <= measured * (100 + within) && expected * 100 >= measured * (100 - within))) ||
        fail "$label: planned $expected bytes, measured $measured"
}
