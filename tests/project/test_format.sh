#!/usr/bin/env bash
# Proves that every C source is formatted as .clang-format says (clang-format 14), and that a badly formatted one would be seen.
# Refuses other versions: each formats a little differently.
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"
command -v clang-format-14 >/dev/null || skip "clang-format-14 is not here (package clang-format-14)"
cp "$CUPEL_SOURCE/.clang-format" .
printf 'int  main( void ){return 0;}\n' >planted.c
if clang-format-14 --dry-run -Werror planted.c 2>/dev/null; then fail "a badly formatted file was not seen"; fi
cd "$CUPEL_SOURCE"
mapfile -d '' sources < <(find io kernels comm jobs tests \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -print0)
((${#sources[@]} > 0)) || fail "no sources"
clang-format-14 --dry-run -Werror "${sources[@]}" || fail "run: clang-format-14 -i FILE"
echo "${#sources[@]} files are formatted"
