#!/usr/bin/env bash
# A study runs to its end by sbatch on 2 nodes of a real Slurm, with srun --mpi=pmix and with mpirun, to the same weights; stopped by USR2 it ends with 75 and
# goes on when it is submitted again. Refuses to pass where Slurm is not installed: then it is skipped.
# ctest: TIMEOUT 900 LABELS slow
set -euo pipefail
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
export PATH=$PATH:/usr/sbin:/sbin
for tool in slurmctld slurmd munged sbatch; do
    command -v $tool >/dev/null || skip "$tool is not here (packages munge slurmd slurmctld slurm-client slurm-wlm-basic-plugins libpmix2)"
done

scratch=$(mktemp -d /tmp/cupel-slurm.XXXXXX) # a short path: sockets lie in it
chmod 711 "$scratch"                          # munge wants to be reached by all
export SLURM_BOX_DIR=$scratch/box
# Two runs of this test at a time must not meet: a base port of its own for each.
export SLURM_BOX_PORT=$((18000 + $$ % 200 * 8)) SLURM_BOX_NET=10.213.$(($$ % 250))
box() { bash "$CUPEL_SOURCE/tests/slurm/slurm-box" "$@" </dev/null; }
finish() {
    local status=$?
    ((status == 0)) || tail -n 20 "$SLURM_BOX_DIR"/log/*.log >&2 || true
    box down >/dev/null || true
    rmdir "$scratch" || true
}
trap finish EXIT
box up 2
eval "$(box env)"
export CUPEL CUPEL_LAUNCHER

tiny_text text.txt
tiny_study job.yaml
# submit LOG ARG...: the exit status of the batch job.
submit() {
    local log=$1
    shift
    timeout -k 5 200 sbatch --wait --quiet --output="$log" "$CUPEL_SOURCE/slurm/study.sbatch" "$@"
}
for CUPEL_LAUNCHER in srun mpirun; do
    submit $CUPEL_LAUNCHER.log job.yaml $CUPEL_LAUNCHER || { cat $CUPEL_LAUNCHER.log >&2; fail "$CUPEL_LAUNCHER: exit status $?"; }
    has $CUPEL_LAUNCHER.log "6 of 6 stages ran"
    has $CUPEL_LAUNCHER.log "cupel ended with exit status 0"
    [[ $(attribute $CUPEL_LAUNCHER/results.h5 ranks) == 2 ]] || fail "$CUPEL_LAUNCHER: ran on $(attribute $CUPEL_LAUNCHER/results.h5 ranks) ranks"
done
if box status | grep -q '^node-n1:'; then
    [[ $(attribute srun/results.h5 hostnames) == n1,n2 ]] || fail "ran on $(attribute srun/results.h5 hostnames)"
fi
teacher=$(attribute srun/results.h5 stages/teacher/model)
same "srun/$teacher" "mpirun/$teacher" param m v
submit again.log job.yaml srun || fail "second run"
has again.log "nothing to do"

# A job that would take long is told to stop, saves, says 75; submitted again it goes on from there.
# until_true SECONDS COMMAND...: fails where the command does not succeed in time.
until_true() {
    local n=$(($1 * 10)) i
    shift
    for ((i = 0; i < n; i++)); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    cat ./*.log >&2
    fail "not in time: $*"
}
checkpoint_in() { [[ -n $(find "$1/checkpoints" -name 'step-*.h5') ]]; }
for CUPEL_LAUNCHER in srun mpirun; do
    out=stop-$CUPEL_LAUNCHER
    long=(job.yaml "$out" --set teacher.steps=1000000 --set run.checkpoint_every=20)
    for round in 1 2; do
        id=$(sbatch --parsable --output="$out-$round.log" "$CUPEL_SOURCE/slurm/study.sbatch" "${long[@]}")
        if ((round == 1)); then until_true 60 checkpoint_in "$out"; else until_true 60 grep -q 'resuming from step' "$out-2.log"; fi
        scancel --batch --signal=USR2 "$id"
        until_true 60 grep -q 'cupel ended with exit status' "$out-$round.log"
        has "$out-$round.log" "cupel ended with exit status 75"
    done
done
echo "sbatch with srun and with mpirun: the same weights; USR2 stops both with 75"
