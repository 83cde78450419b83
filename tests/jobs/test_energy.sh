# Energy in the results, from counters made like the kernel's that rise while the jobs run: once however many ranks share them, absent
# where there are none; a sweep's score and front by energy only where a trial's can be told.
# Refuses a figure that is more than what the counter rose.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt 3000
tiny_study job.yaml
sed -i 's/held_out: 0.1/held_out: 0.4/' job.yaml

# A package whose counter rises by 2 J about every 20 ms; what it rose in all is in the file.
zone=$PWD/powercap/intel-rapl:0
mkdir -p "$zone"
echo package-0 >"$zone/name"
echo 262143328850 >"$zone/max_energy_range_uj"
echo 1000000 >"$zone/energy_uj"
(
    for ((uj = 1000000; ; uj += 2000000)); do
        echo $uj >"$zone/next" && mv "$zone/next" "$zone/energy_uj" && sleep 0.02
    done
) &
trap "kill $! 2>/dev/null" EXIT
now() { cat "$zone/energy_uj"; }
export CUPEL_POWERCAP=$PWD/powercap

# total FILE: energy_j of all stages.
total() {
    local sum=0 stage
    for stage in teacher student pruned int4 measured grid; do
        sum="$sum + $(attribute "$1" "/stages/$stage/energy_j")"
    done
    awk "BEGIN { printf \"%.9g\", $sum }"
}
for n in 1 2; do
    before=$(now)
    ranks $n "$CUPEL" run job.yaml --quiet --out n$n --set run.device=cpu --set grid.group_ranks=$n >out 2>err || { cat err >&2; fail "run on $n"; }
    after=$(now)
    sum=$(total n$n/results.h5)
    awk -v sum="$sum" -v rose=$((after - before)) 'BEGIN { exit !(sum <= rose * 1e-6 && sum > 0.1 * rose * 1e-6) }' ||
        fail "$n ranks: the stages drew $sum J, the counter rose from $before to $after uJ"
    [ "$(attribute n$n/results.h5 /stages/teacher/energy_source)" = RAPL ] || fail "source"
    awk -v x="$(attribute n$n/results.h5 /stages/teacher/tokens_per_j)" 'BEGIN { exit !(x > 0) }' || fail "tokens_per_j"
    [[ $(attribute n$n/results.h5 /stages/measured/device_bytes_peak) =~ ^[1-9] ]] || fail "device_bytes_peak of eval"
done

# Two groups of one rank share the package: nobody can tell what a trial drew.
refused() {
    local status=0 text=$1
    shift
    ranks 2 "$CUPEL" run job.yaml --quiet "$@" >out 2>err || status=$?
    ((status == 2)) || { cat err >&2; fail "$*: exit status $status"; }
    has err "$text"
}
refused "raise group_ranks" --out n3 --set run.device=cpu --set grid.pareto=val_loss,energy --set grid.group_ranks=1
CUPEL_POWERCAP=nowhere refused "energy is not measured here" --out n3 --set run.device=cpu --set grid.pareto=val_loss,energy --set grid.group_ranks=2
refused "expected val_loss, bytes, latency or energy" --out n2 --set grid.pareto=joules

# The score and the front by energy, each trial's evaluation long enough for the counter.
sed -i 's/objective: {memory: 0.1}/objective: {energy: 0.5}/' job.yaml
ranks 2 "$CUPEL" run job.yaml --quiet --out n2 --set run.device=cpu --set grid.group_ranks=2 --set grid.pareto=val_loss,energy >out 2>err ||
    { cat err >&2; fail "sweep by energy"; }
for array in val_loss energy_j score pareto; do values n2/results.h5 /stages/grid/$array | tr ' ' '\n' >$array.txt; done
loss=$(attribute n2/results.h5 /stages/grid/reference_val_loss) energy=$(attribute n2/results.h5 /stages/grid/reference_energy_j)
paste val_loss.txt energy_j.txt score.txt pareto.txt | awk -v l0="$loss" -v e0="$energy" '
    { want = $1 / l0 + 0.5 * $2 / e0; d = want - $3; if (!($2 > 0) || d > 1e-9 || d < -1e-9) bad++; n++; loss[n] = $1; e[n] = $2; front[n] = $4 }
    END {
        for (i = 1; i <= n; i++) {
            on = 1
            for (j = 1; j <= n; j++) if (j != i && loss[j] <= loss[i] && e[j] <= e[i] && (loss[j] < loss[i] || e[j] < e[i] || j < i)) on = 0
            if (on != front[i]) bad++
        }
        exit !(n == 12 && bad == 0 && e0 > 0)
    }' || { paste val_loss.txt energy_j.txt score.txt pareto.txt >&2; fail "score or front (unchanged model: $loss nat/token, $energy J)"; }

# Without counters there is no attribute, and the trials' joules are NaN.
export CUPEL_POWERCAP=nowhere
"$CUPEL" run job.yaml --quiet --out none --set run.device=cpu --set grid.pareto=val_loss --set teacher.steps=2 >out 2>err && fail "a score by energy without a meter"
sed -i 's/objective: {energy: 0.5}/objective: {memory: 0.1}/' job.yaml
"$CUPEL" run job.yaml --quiet --out none --set run.device=cpu --set teacher.steps=2 >out 2>err || { cat err >&2; fail "run without counters"; }
h5dump -A none/results.h5 >attributes.txt
! grep -qE '"(energy_j|energy_source|tokens_per_j)"' <(grep ATTRIBUTE attributes.txt) || fail "energy where none is measured"
[ "$(values none/results.h5 /stages/grid/energy_j | tr ' ' '\n' | grep -vc nan)" = 0 ] || fail "joules of trials where none are measured"
