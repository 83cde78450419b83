#!/usr/bin/env bash
# Proves that clang-tidy 14 finds nothing (.clang-tidy) in any source that this build compiles, each looked at once.
# Refuses to pass when it would not notice a defect: a planted one must be found.
# ctest: TIMEOUT 900 LABELS slow
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"
command -v clang-tidy-14 >/dev/null || skip "clang-tidy-14 is not here (package clang-tidy-14)"
[[ -e $CUPEL_BUILD/compile_commands.json ]] || fail "no compile_commands.json in $CUPEL_BUILD"

# clang 14 has no omp.h here; gcc's, but for one attribute, means the same to it. gcc's other headers would not do.
mkdir include
sed 's|__malloc__ (omp_free)|__malloc__|' "$(gcc -print-file-name=include/omp.h)" >include/omp.h
extra=(--extra-arg=-isystem"$PWD/include" --extra-arg=-Wno-unknown-warning-option)

printf '#include <stdlib.h>\nint main(void) {\n    int *p = malloc(sizeof(int));\n    free(p);\n    return *p;\n}\n' >planted.c
# kernels/cpu is compiled once per instruction set; one of them is enough here.
python3 - "$CUPEL_BUILD/compile_commands.json" "$PWD/planted.c" >sources <<'PY'
import json, sys
once = {}
for entry in json.load(open(sys.argv[1])):
    once.setdefault(entry["file"], entry)
first = next(iter(once.values()))
once[sys.argv[2]] = dict(first, command=first["command"].replace(first["file"], sys.argv[2]), file=sys.argv[2])
json.dump(list(once.values()), open("compile_commands.json", "w"))
print("\n".join(sorted(once)))
PY
cp "$CUPEL_SOURCE/.clang-tidy" .

tidy() { xargs -d '\n' -n 4 -P 2 clang-tidy-14 --quiet -p . --config-file=.clang-tidy "${extra[@]}" "$@" 2>errors; }
if echo "$PWD/planted.c" | tidy >planted.out; then fail "a use after free was not found"; fi
has planted.out clang-analyzer-unix.Malloc
grep -vxF "$PWD/planted.c" sources >ours
(($(wc -l <ours) > 10)) || fail "only $(wc -l <ours) sources are compiled here"
# Tests: without the analyzer, which follows every path and takes most of the time, and with liberties that programs must not take.
found=0
grep -v '/tests/' ours | tidy >report || found=1
grep '/tests/' ours | tidy '--checks=-clang-analyzer-*,-cert-*,-bugprone-suspicious-memory-comparison,-misc-redundant-expression' >>report || found=1
((found == 0)) || { cat report; grep 'error:' errors || true; fail "clang-tidy found something"; }
echo "clang-tidy found nothing in $(wc -l <ours) files"
