#!/usr/bin/env bash
# Proves what the build says: which package is missing, which HDF5 and BLAS it takes, and which revision it is of.
# Refuses to build anything: it only configures.
set -euo pipefail
. "$CUPEL_SOURCE/tests/support/ranks.sh"
configure() { cmake -S "$CUPEL_SOURCE" -B "$@" >log 2>&1; }

# Without a toolkit the CUDA back end is refused by name of what is missing; wanted or not is said by a word that is checked.
if configure cuda -DCUPEL_CUDA=ON -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON; then fail "configured a CUDA back end without CUDA"; fi
has log "a CUDA toolkit from 12.0"
if configure wrong0 -DCUPEL_CUDA=yes; then fail "took CUPEL_CUDA=yes"; fi
has log "expected ON, OFF or auto"

# Nothing can be found under an empty prefix: all that is missing is named at once, each with its package.
mkdir empty
if PKG_CONFIG_LIBDIR=$PWD/empty configure none -DCMAKE_FIND_ROOT_PATH="$PWD/empty" -DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY \
    -DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY -DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON -DCMAKE_DISABLE_FIND_PACKAGE_HDF5=ON; then fail "configured with nothing there"; fi
for package in libopenmpi-dev libhdf5-openmpi-dev libdnnl-dev libyaml-dev libcmocka-dev; do has log "$package"; done

if configure wrong -DCUPEL_HDF5=paralel; then fail "took CUPEL_HDF5=paralel"; fi
has log "expected auto, parallel or serial"
if configure wrong2 -DCUPEL_BLAS=mkl; then fail "took CUPEL_BLAS=mkl"; fi
has log "expected auto, onednn or cblas"

for kind in parallel serial; do
    pkg-config --exists hdf5-$kind || [[ $kind == parallel ]] || continue
    if configure "$kind" -DCUPEL_HDF5=$kind; then has log "HDF5: $kind"; else has log "HDF5"; fi
done

# The revision header: of a clone with and without changes, of an archive, of a plain copy; and left untouched when nothing changed.
version() { cmake -DSOURCE="$1" -DOUTPUT="$PWD/v.h" -DCUPEL_VERSION=1 -P "${2:-$1}/io/base/version.cmake" && sed -n 's/.*GIT_REVISION "\(.*\)"/\1/p' v.h; }
mkdir -p plain/io/base
cp "$CUPEL_SOURCE"/io/base/version.{cmake,h.in} plain/io/base/
cp "$CUPEL_SOURCE/.gitattributes" plain/
[[ $(version plain) == unknown ]] || fail "a plain copy claims to be $(version plain)"
command -v git >/dev/null || { echo "no git here: the revisions of clones are not looked at"; exit 0; }
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init -q clone
cp -r plain/. clone
git -C clone add -A
git -C clone commit -qm one
head=$(git -C clone rev-parse HEAD)
[[ $(version clone) == "$head" ]] || fail "a clone at $head is called $(version clone)"
before=$(stat -c %y v.h)
version clone >/dev/null
[[ $(stat -c %y v.h) == "$before" ]] || fail "the header was written again with the same revision"
echo >>clone/io/base/version.h.in
[[ $(version clone) == "$head-dirty" ]] || fail "a changed clone is called $(version clone)"
git -C clone checkout -q .
mkdir archive
git -C clone archive HEAD | tar x -C archive
[[ $(version archive) == "$head" ]] || fail "an archive of $head is called $(version archive)"
mkdir bin
for tool in cmake sed; do ln -s "$(command -v $tool)" bin/; done
[[ $(PATH=$PWD/bin version clone) == "$head" ]] || fail "without git, a clone at $head is called $(PATH=$PWD/bin version clone)"
echo "the build says what it is"
