# A failure on one rank only ends all ranks in order: one message that names the rank and the cause, the right exit status, no hang.
# Refuses a time limit as an end: ranks.sh would report 124.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml
mkdir -p elsewhere
ends_with() { # ends_with STATUS TEXT
    ((status == $1)) || { cat out.txt >&2; fail "exit status $status, expected $1"; }
    has out.txt "$2"
    (($(grep -c '^cupel: ' out.txt) == 1)) || { cat out.txt >&2; fail "not exactly one message"; }
}
# one_other N RANK COMMANDS ARG...: cupel on N ranks, before one of which the shell does something else. Several programs of one mpirun
# ("a : b") would be plainer, but Debian 13's crashes over them.
one_other() {
    local n=$1 script='[ "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" != '"$2 ] || { $3; }"'; exec "$0" "$@"'
    shift 3
    ranks "$n" sh -c "$script" "$CUPEL" "$@" >out.txt 2>&1
}
# The text is not there for rank 1 of 3, which stands in another folder.
status=0
cp job.yaml elsewhere/
one_other 3 1 'cd elsewhere' run job.yaml --quiet --out out || status=$?
ends_with 1 "rank 1: text.txt"

# The text of rank 1 is another one of the same name.
cat text.txt text.txt >elsewhere/text.txt
status=0
one_other 2 1 'cd elsewhere' run job.yaml --quiet --out out || status=$?
ends_with 1 "rank 1: text.txt: the corpus has"
[[ ! -e out ]] || fail "a job that could not begin made its folder"

# Rank 2 of 3 may take less device memory than its part of the model.
status=0
big=(--quiet --out big --set teacher.width=256 --set teacher.heads=8 --set run.device=cpu)
one_other 3 2 'export CUPEL_DEVICE_BYTES=4Mi' run job.yaml "${big[@]}" || status=$?
ends_with 1 "rank 2: "
has out.txt "bytes wanted on"
has out.txt "CUPEL_DEVICE_BYTES allows 4194304"

# What would fit is told, and does; the next larger one does not.
big=(--quiet --out fits --set run.device=cpu --set teacher.width=64 --set teacher.layers=6 --set teacher.micro_batch=8 --set teacher.optimizer=sharded)
limited() { CUPEL_DEVICE_BYTES=5300k ranks 2 "$CUPEL" run job.yaml "${big[@]}" "$@" >out.txt 2>&1; }
status=0
limited || status=$?
ends_with 1 "what would fit: micro_batch 2 with recompute none, or micro_batch 4 with recompute gelu, or micro_batch 8 with recompute block"
limited --set teacher.micro_batch=4 && fail "micro_batch 4 fits, and 2 is said to be the largest"
for pair in 2:none 4:gelu 8:block; do
    limited --set teacher.micro_batch=${pair%:*} --set teacher.recompute=${pair#*:} || { cat out.txt >&2; fail "$pair does not fit"; }
done
status=0
CUPEL_DEVICE_BYTES=100k ranks 2 "$CUPEL" run job.yaml "${big[@]}" --out none >out.txt 2>&1 || status=$?
ends_with 1 "no micro_batch would fit"
status=0
CUPEL_DEVICE_BYTES=much "$CUPEL" run job.yaml "${big[@]}" --out none >out.txt 2>&1 || status=$?
ends_with 2 "CUPEL_DEVICE_BYTES=much"

# The environment's choice of a device is the same for all ranks, and one that there is.
status=0
(unset CUPEL_DEVICE && one_other 2 1 'export CUPEL_DEVICE=cpu' info) || status=$?
ends_with 2 "auto for some ranks, cpu for others"
status=0
CUPEL_DEVICE=tpu ranks 2 "$CUPEL" info >out.txt 2>&1 || status=$?
ends_with 2 "CUPEL_DEVICE=tpu"

# TF32 is the GPU's: told before anything is made.
tiny_study study.yaml
for option in teacher student pruned measured grid; do
    status=0
    ranks 2 "$CUPEL" run study.yaml --quiet --out tf32 --set $option.precision=tf32 --set run.device=cpu >out.txt 2>&1 || status=$?
    ends_with 2 "$option: precision: tf32 needs a GPU"
    [[ ! -e tf32 ]] || fail "a job that could not begin made its folder"
done

# A folder that cannot be written to: found by rank 0, told once.
status=0
touch file
ranks 3 "$CUPEL" run job.yaml --quiet --out file/sub >out.txt 2>&1 || status=$?
ends_with 1 "file/sub"

# Two jobs in one folder: the second is refused while the first holds it.
mkdir -p locked
(
    flock -x 9
    status=0
    ranks 2 "$CUPEL" run job.yaml --quiet --out locked >out.txt 2>&1 || status=$?
    ends_with 2 "another cupel job"
) 9>locked/.lock || exit 1
ranks 2 "$CUPEL" run job.yaml --quiet --out locked >out.txt 2>&1 || { cat out.txt >&2; fail "the folder is free again"; }

# A rank that is killed takes the others with it, and the folder is free for the next.
export OMPI_MCA_btl_vader_backing_directory=$PWD
timeout 60 mpirun -n 3 "$CUPEL" run job.yaml --out killed --set teacher.steps=1000000 --set teacher.eval_every=0 >out.txt 2>&1 </dev/null &
job=$!
until ls killed/checkpoints/*/step-*.h5 >/dev/null 2>&1 || ! kill -0 $job 2>/dev/null; do sleep 0.05; done
kill -KILL "$(pgrep -P "$(pgrep -P $job)" -x cupel | tail -n 1)" || fail "no rank to kill"
status=0
wait $job || status=$?
((status != 0 && status != 124)) || { cat out.txt >&2; fail "a job whose rank was killed ended with status $status"; }
ranks 1 "$CUPEL" run job.yaml --quiet --out killed >out.txt 2>&1 || { cat out.txt >&2; fail "the folder is not free"; }
