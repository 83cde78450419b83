# NCCL with one rank, where no second GPU is needed: sums, graphs and a training job take its way and keep their bits.
# Refuses to pass without a GPU: it is skipped and says so.
. "$CUPEL_SOURCE/tests/comm/cuda/nccl.sh"

ranks 1 "$CUPEL_BUILD/ranks_nccl" >out.txt 2>&1 || { cat out.txt >&2; fail "ranks_nccl on 1 rank"; }
has out.txt "1 ranks"
for p in bf16 fp16; do
    run mpi-$p 1 0 teacher.precision=$p teacher.steps=20
    run nccl-$p 1 1 teacher.precision=$p teacher.steps=20
    same "$(model mpi-$p)" "$(model nccl-$p)" param m v metrics_eval
    [ "$(values mpi-$p/results.h5 /stages/teacher/loss)" = "$(values nccl-$p/results.h5 /stages/teacher/loss)" ] || fail "$p: other losses"
done
run fault 1 1 teacher.precision=fp16 teacher.loss_scale=1024 teacher.inject_step=2 teacher.inject_tensor=wte
[ "$(values fault/results.h5 /stages/teacher/overflow)" = "0 0 1 0 0 0" ] || fail "overflow: $(values fault/results.h5 /stages/teacher/overflow)"

# Two ranks that share the GPU go through host memory, say so, and refuse a demand for NCCL.
if ((gpus == 1)); then
    ranks 2 "$CUPEL" info >info-2.txt || fail "info on 2 ranks"
    has info-2.txt "host memory over MPI: ranks 0 and 1 share a GPU"
    CUPEL_NCCL=1 ranks 2 "$CUPEL" run job.yaml --out shared --set run.device=cuda >out.txt 2>&1 && fail "NCCL for two ranks of one GPU"
    has out.txt "ranks 0 and 1 share a GPU"
fi
exit 0
