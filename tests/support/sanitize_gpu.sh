# sanitize_gpu.sh COMPUTE_SANITIZER TOOL PROGRAM: the program on a GPU under that tool; an error that it finds fails the test.
# Refuses to pass without a GPU: the sanitizer would, so it is asked for first. Errors that CUDA's own calls return are the program's to check.
. "$CUPEL_SOURCE/tests/support/ranks.sh"
CUPEL_DEVICE=cpu "$CUPEL" info >info.txt 2>&1 || fail "info: $(cat info.txt)"
grep -q '^ GPU ' <(CUPEL_DEVICE=auto "$CUPEL" info) || skip "$(sed -n 's/^ CUDA  *//p' info.txt)"
ours=()
[ "$2" = memcheck ] || ours=(--kernel-name-exclude "regex=nvjet|cutlass|xmma|cublas|gemm|splitK|cudnn") # how libraries use shared memory is theirs
"$1" --tool "$2" "${ours[@]}" --error-exitcode 99 --report-api-errors no --max-connections 100 --print-limit 20 "$3" >out.txt 2>&1
status=$?
# On Hopper racecheck breaks down over programs with products by the bulk copy engine, even when it is told to look at no kernel at all.
[ "$2" = racecheck ] && grep -q 'Internal Sanitizer Error' out.txt && skip "$2 itself broke down: $(grep -m 1 -o 'Internal Sanitizer Error.*' out.txt)"
((status == 0 || status == 77)) || { tail -n 200 out.txt; fail "$2: exit status $status"; }
grep -qE 'ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards' out.txt || { tail -n 200 out.txt; fail "$2 did not come to an end"; }
grep -E 'SUMMARY|PASSED' out.txt
