# Sourced by the tests of whole jobs: a text and jobs so small that a run takes about a second.
# Refuses nothing; what a test changes it gives as further lines or as --set.
. "$CUPEL_SOURCE/tests/support/ranks.sh"
export CUPEL_PROGRESS_SECONDS=1000

# tiny_text FILE [LINES]: the same words for every test.
tiny_text() {
    awk -v n="${2:-400}" 'BEGIN { split("in the beginning god created heaven and earth without form void darkness was upon face deep", w, " ");
        s = 7; for (i = 0; i < n; i++) { l = ""; for (j = 0; j < 8; j++) { s = (s * 1103515245 + 12345) % 2147483648; l = l w[1 + int(s / 65536) % 16] " " } print l } }' >"$1"
}

# tiny_train [OPTION VALUE]...: the options of a stage train as YAML, later ones win.
tiny_options='layers: 2, heads: 2, width: 32, context: 32, steps: 6, micro_batch: 2, global_batch: 16, precision: fp16, lr: 1e-3, schedule: constant, warmup: 0, eval_every: 3'

# tiny_job FILE: teacher only. cupel run it with --set for the rest.
tiny_job() {
    printf 'name: tiny\nseed: 7\ncorpus: {train: [text.txt], held_out: 0.1}\nrun: {threads: 1, checkpoint_every: 2}\nstages:\n  - train: {name: teacher, %s}\n' \
        "$tiny_options" >"$1"
}
# tiny_study FILE: every kind of stage.
tiny_study() {
    tiny_job "$1"
    cat >>"$1" <<'YAML'
  - distill: {name: student, teacher: teacher, layers: 1, steps: 4, micro_batch: 2, global_batch: 16, precision: fp16, lr: 1e-3, warmup: 0}
  - prune: {name: pruned, model: teacher, sparsity: 0.5, finetune_steps: 3, micro_batch: 2, global_batch: 16, lr: 1e-4, warmup: 0}
  - quantize: {name: int4, model: pruned, bits: 4, granularity: group16}
  - eval: {name: measured, model: int4, latency_runs: 3}
  - sweep:
      name: grid
      model: [teacher, student]
      prune: {sparsity: [0, 0.5]}
      quantize: {bits: [16, 8, 4], granularity: group16}
      objective: {memory: 0.1}
      latency_runs: 3
YAML
}

# model DIR: the newest checkpoint of the only training stage of a study.   same A B ARRAY...: fails unless the arrays are bit-identical.
model() { find "$1/checkpoints" -name 'step-*.h5' -printf '%f %p\n' | sort -t- -k2 -n | tail -n 1 | cut -d' ' -f2; }
same() {
    local a=$1 b=$2 array
    shift 2
    for array in "$@"; do
        h5diff "$a" "$b" "/$array" "/$array" >diff.txt 2>&1 || { head -n 5 diff.txt >&2; fail "$array differs between $a and $b"; }
    done
}
# attribute FILE NAME: of the root group (or of OBJECT/NAME), as h5dump prints its value.
attribute() { h5dump -m %.17g -a "$2" "$1" | sed -n 's/^ *(0): *//p' | tr -d '"'; }
# values FILE DATASET: its numbers, separated by blanks.
values() { h5dump -y -w 0 -m %.17g -d "$2" "$1" | awk '/^ *DATA \{/ { on = 1; next } on && /\}/ { exit } on { gsub(/[ ,]+/, " "); printf "%s", $0 }' | tr -s ' ' | sed 's/^ *//; s/ *$//'; }
# close A B DATASET BOUND: all values of the two are numbers that differ by less than BOUND.
close() {
    paste <(values "$1/results.h5" "$3" | tr ' ' '\n') <(values "$2/results.h5" "$3" | tr ' ' '\n') |
        awk -v bound="$4" '{ d = $1 - $2; d = d < 0 ? -d : d; if (!(d < bound) || ($1 $2) !~ /^[-+.0-9e]+$/) bad++; if (d > most) most = d; n++ }
            END { printf "%d values, at most %g apart\n", n, most; exit !(n > 0 && bad == 0) }' || fail "$3 of $1 and $2: more than $4 apart"
}
