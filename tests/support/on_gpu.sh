# on_gpu.sh GPUS SCRIPT: the test script with everything on the GPU: its ranks share one (GPUS 1), or take all that there are (GPUS 2).
# Refuses to pass where there are fewer GPUs: skipped, and it says so.
# on_gpu.sh GPUS warm: times the matrix products of the small jobs once, so that later runs on any number of ranks choose the same.
# Choices lie in $CUPEL_WARM; a script works on a copy.
. "$CUPEL_SOURCE/tests/support/ranks.sh"
export CUPEL_ATTENTION=own
CUPEL_DEVICE=cpu "$CUPEL" info >info.txt 2>&1 || fail "info: $(cat info.txt)"
found=$(sed -n 's/^ CUDA .*[^0-9]\([0-9][0-9]*\) GPUs\{0,1\}.*/\1/p' info.txt)
found=${found:-$(grep -c '^ GPU [0-9]' info.txt)}
((found > 0)) || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
((found >= $1)) || skip "$found GPU here, $1 are needed"
export CUPEL_DEVICE=cuda
if (($1 == 1)); then
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
fi
if [ "$2" = warm ]; then
    export CUPEL_CACHE=$CUPEL_WARM
    rm -rf "$CUPEL_WARM"
    mkdir -p "$CUPEL_WARM"
    . "$CUPEL_SOURCE/tests/jobs/tiny.sh"
    tiny_text text.txt
    tiny_study job.yaml
    for p in fp16 bf16 fp32; do
        ranks 1 "$CUPEL" run job.yaml --out "$p" --quiet --set teacher.precision=$p --set student.precision=$p >out.txt 2>&1 || { cat out.txt >&2; fail "study in $p"; }
    done
    exit 0
fi
export CUPEL_CACHE=$PWD/cache
rm -f info.txt
mkdir "$CUPEL_CACHE"
cp -r "$CUPEL_WARM/." "$CUPEL_CACHE" || fail "no choices to begin with in $CUPEL_WARM"
exec bash "$2"
