#!/usr/bin/env bash
# Every test: installs what is missing, builds cpu (warnings are errors) and asan, runs both, ends with the line "N passed, N failed".
# Where a CUDA toolkit is found the preset cuda is built too, and where a GPU is found the same tests run on it: label cuda (tests/CMakeLists.txt).
# Refuses to end well when anything failed: a build that fails counts as a failed test, a skipped test never counts as passed.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tests/run.sh [--fast | --sanitize-cuda] [--only REGEX]

  --fast            the optimised build only, without the tests that take long
  --sanitize-cuda   only the tests of operations and models on a GPU, under compute-sanitizer: memcheck, racecheck
  --only REGEX      only the tests whose name (folder/name) matches, in all builds
TEXT
}
presets=(cpu asan) select=() label=cuda
while (($#)); do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --fast) presets=(cpu) select+=(--label-exclude slow) ;;
    --sanitize-cuda) presets=() label=sanitize ;;
    --only)
        (($# >= 2)) || { usage >&2; exit 2; }
        select+=(--tests-regex "$2")
        shift
        ;;
    *) echo "cupel: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
passed=0 failed=0 skipped=()
finish() {
    local status=$?
    ((status == 0 || failed > 0)) || failed=1
    ((${#skipped[@]} == 0)) || printf 'skipped: %s\n' "${skipped[@]}"
    echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
    echo "$passed passed, $failed failed"
    ((failed == 0)) && exit 0
    exit 1
}
trap finish EXIT

groups=(build text test)
# The Slurm tests start daemons and network name spaces, which takes root; elsewhere they are skipped and say so.
((EUID == 0)) && groups+=(slurm)
bash jobs/deps.sh "${groups[@]}"

build() {
    echo "== building $1 =="
    mkdir -p "build/$1"
    local log=build/$1/build.log
    { cmake --preset "$1" -DCUPEL_WERROR=ON -DCUPEL_TESTS=ON && cmake --build "build/$1" --parallel "$(nproc)"; } >"$log" 2>&1 ||
        { grep -E -A 12 'error|FAILED|CMake Error' "$log" | head -n 80 >&2; echo "cupel: the build of $1 failed, all of it is in $log" >&2; return 1; }
}
# has_cuda: nvcc of CUDA 12 or newer.
has_cuda() {
    local nvcc version
    nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null) || return 1
    version=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
    ((${version:-0} >= 12))
}
built=("${presets[@]}")
if [[ ${presets[*]} == *asan* || $label == sanitize ]] && has_cuda; then built+=(cuda); fi
for preset in "${built[@]}"; do build "$preset"; done
if [[ $label == sanitize ]]; then
    [[ ${built[*]} == cuda ]] || { echo "cupel: --sanitize-cuda: no CUDA toolkit is here" >&2; exit 1; }
    [[ $(ctest --test-dir build/cuda -N) == *memcheck/* ]] || { echo "cupel: --sanitize-cuda: compute-sanitizer is not here" >&2; exit 1; }
fi
if [[ ${built[*]} == *cuda* ]]; then
    if [[ $(build/cuda/cupel info) == *$'\n GPU '* ]]; then presets+=(cuda); else skipped+=("cuda: built, but no GPU to run its tests on is here"); fi
fi

attribute() { sed -n "s/^[[:space:]]*$1=\"\([0-9]*\)\".*/\1/p;s/.*<testsuite .*[[:space:]]$1=\"\([0-9]*\)\".*/\1/p" "$2" | head -n 1; }
for preset in "${presets[@]}"; do
    echo "== testing $preset =="
    report=build/$preset/tests.xml of_cuda=()
    [[ $preset != cuda ]] || of_cuda=(--label-regex "^$label\$")
    rm -f "$report"
    ctest --test-dir "build/$preset" --output-on-failure --parallel "$(nproc)" --output-junit "$PWD/$report" "${select[@]}" "${of_cuda[@]}" </dev/null || true
    [[ -s $report ]] || { failed=$((failed + 1)); echo "cupel: ctest left no report for $preset" >&2; continue; }
    tests=$(attribute tests "$report") failures=$(attribute failures "$report") left_out=$(attribute skipped "$report") off=$(attribute disabled "$report")
    failed=$((failed + failures))
    passed=$((passed + tests - failures - left_out - off))
    mapfile -t -O "${#skipped[@]}" skipped < <(awk -v preset="$preset" '/<testcase /{name=$0; sub(/.*<testcase name="/,"",name); sub(/".*/,"",name)}
        /SKIPPED: /{sub(/.*SKIPPED: /,""); sub(/<.*/,""); print preset " " name ": " $0}' "$report")
done
((passed + failed > 0)) || { echo "cupel: no test was run" >&2; exit 1; }
