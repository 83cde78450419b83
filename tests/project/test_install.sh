#!/usr/bin/env bash
# Proves that `cmake --install` gives a program that runs and a package that a project elsewhere finds, links with and runs, also after the prefix was moved.
# Refuses the build folder's help: nothing installed may name it.
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"

cmake --install "$CUPEL_BUILD" --prefix "$PWD/first" >install.log || { cat install.log; fail "cmake --install"; }
mv first second
if grep -rlF "$CUPEL_BUILD" second --include='*.cmake' --include='*.h'; then fail "an installed file names the build folder"; fi
if grep -rlF "$PWD/first" second --include='*.cmake'; then fail "the package is tied to its first prefix"; fi

cmake -S "$CUPEL_SOURCE/tests/project/consumer" -B consumer -DCMAKE_PREFIX_PATH="$PWD/second" -DCMAKE_BUILD_TYPE=Release >configure.log 2>&1 ||
    { cat configure.log; fail "find_package(cupel)"; }
cmake --build consumer >build.log 2>&1 || { cat build.log; fail "linking with cupel::"; }
ranks 1 consumer/consumer >out 2>&1 || { cat out; fail "the consumer's program"; }
has out "cupel 0.1.0, 1 rank, status 0 is"

[[ $(<consumer/program.txt) == "$PWD/second/bin/cupel" ]] || fail "cupel::cupel is $(<consumer/program.txt)"
ranks 1 second/bin/cupel info >info 2>&1 || { cat info; fail "the installed program"; }
has info 0.1.0
if cmake -S "$CUPEL_SOURCE/tests/project/consumer" -B other -DCMAKE_PREFIX_PATH="$PWD/nowhere" >other.log 2>&1; then fail "found without a package"; fi
