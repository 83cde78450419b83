# kill -9 of all ranks at 30 random instants, on 1, 2 and 4 ranks: resumed each time, the final checkpoint has the bits of an unbroken run; a
# signal stops a run in order. Refuses luck: every kill that counts hit a run at work, and runs did go on from checkpoints.
# ctest: TIMEOUT 1500 LABELS slow
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
# Killed ranks leave their shared memory behind: here, not in /dev/shm.
export OMPI_MCA_btl_vader_backing_directory=$PWD OMPI_MCA_osc_sm_backing_directory=$PWD
tiny_text text.txt
tiny_job job.yaml
wanted=30
[[ -z ${CUPEL_SANITIZE:-} && ${CUPEL_DEVICE:-} != cuda ]] || wanted=8
arrays=(param m v metrics_step metrics_eval metrics_event)
args=(run job.yaml --set teacher.steps=90 --set teacher.reduction=tree --set run.checkpoint_every=3 --set teacher.eval_every=20 --set teacher.inject_step=7)
ranks 2 "$CUPEL" "${args[@]}" --out unbroken --quiet >out.txt 2>&1 || { cat out.txt >&2; fail "unbroken run"; }
no_halves() { [[ -z $(find "$1" -name '*.part') ]] || fail "$1: half-written files were left: $(find "$1" -name '*.part')"; }

# Ranks of its own session are all that a kill may hit.
begin() { # begin DIR RANKS
    setsid timeout 120 mpirun -n "$2" "$CUPEL" "${args[@]}" --out "$1" >"$1.txt" 2>&1 </dev/null &
    job=$!
}
events() { if [[ -e broken/log.jsonl ]]; then wc -l <broken/log.jsonl; else echo 0; fi; }
RANDOM=${CUPEL_TEST_SEED:-12345}
hits=0 resumed=0
for ((try = 0; hits < wanted; try++)); do
    ((try < 4 * wanted)) || fail "only $hits of $try kills hit a run at work"
    before=$(events)
    begin broken $((1 << RANDOM % 3))
    # Every fifth while the ranks start, the others when the run has come some way: a number of events, not of seconds, for machines differ.
    if ((try % 5 == 0)); then
        sleep "0.$((RANDOM % 1000))"
    else
        goal=$((before + RANDOM % 60))
        while (($(events) < goal)) && kill -0 "$job" 2>/dev/null; do sleep 0.01; done
        sleep "0.0$((RANDOM % 100))"
    fi
    if kill -0 "$job" 2>/dev/null && pkill -KILL -s "$job"; then hits=$((hits + 1)); fi
    { wait "$job"; } 2>/dev/null
    if grep -q 'resuming from step' broken.txt; then resumed=$((resumed + 1)); fi
    if [[ -e broken/results.h5 ]]; then # it got through: begin again
        same "$(model unbroken)" "$(model broken)" "${arrays[@]}"
        rm -rf broken
    fi
done
((resumed >= wanted / 5)) || fail "only $resumed of $hits killed runs had gone on from a checkpoint"
ranks 2 "$CUPEL" "${args[@]}" --out broken >out.txt 2>&1 || { cat out.txt >&2; fail "the run after $hits kills"; }
same "$(model unbroken)" "$(model broken)" "${arrays[@]}"
no_halves broken

# A signal to mpirun, which hands it to all ranks, and one to a single rank: all ranks save the same step and leave with status 75.
stop() { # stop DIR WHOM
    local i whom status=0
    for ((i = 0; i < 10; i++)); do
        rm -rf "$1"
        begin "$1" 2
        until ls "$1"/checkpoints/*/step-*.h5 >/dev/null 2>&1 || ! kill -0 "$job" 2>/dev/null; do sleep 0.02; done
        whom=$(pgrep -P "$job")
        [[ $2 == mpirun ]] || whom=$(pgrep -P "$whom" -x cupel | tail -n 1)
        kill -USR2 "$whom" 2>/dev/null
        status=0
        wait "$job" || status=$?
        ((status == 0)) || break # 0: it was done before the signal came
    done
    ((status == 75)) || { cat "$1.txt" >&2; fail "a run whose $2 was signalled ended with status $status, expected 75"; }
    has "$1.txt" "by a signal, saved; run the same command again to go on"
    (($(grep -c '^cupel: .*by a signal' "$1.txt") == 1)) || { cat "$1.txt" >&2; fail "more than one message"; }
    [[ ! -e $1/results.h5 ]] || fail "a stopped run left results"
    no_halves "$1"
}
n=1
for whom in mpirun rank; do
    stop "signalled-$whom" $whom
    ranks $n "$CUPEL" "${args[@]}" --out "signalled-$whom" >out.txt 2>&1 || { cat out.txt >&2; fail "resuming on $n ranks"; }
    has out.txt "resuming from step"
    same "$(model unbroken)" "$(model "signalled-$whom")" "${arrays[@]}"
    n=4
done
echo "$hits kills, $resumed runs that went on from a checkpoint"
