# What a training run leaves: losses that fall in every precision, schedules and loss scales step by step, gradient magnitudes, the figures derived
# from them, rows in every series. Refuses a run that only ends.
# ctest: TIMEOUT 900
. "$CUPEL_SOURCE/tests/jobs/tiny.sh"
tiny_text text.txt
tiny_job job.yaml
train() { # train DIR [SETTING]...: on 2 ranks; of study DIR
    local dir=$1 sets=()
    shift
    for s in "$@"; do sets+=(--set "teacher.$s"); done
    ranks 2 "$CUPEL" run job.yaml --out "$dir" --quiet "${sets[@]}" >out.txt 2>&1 || { cat out.txt >&2; fail "$dir"; }
}
series() { values "$1/results.h5" "/stages/teacher/$2"; }
figure() { attribute "$1/results.h5" "stages/teacher/$2"; }
# is WHAT EXPRESSION: of awk.
is() { awk "BEGIN { exit !($2) }" || fail "$1: $2"; }

for p in fp32 bf16 fp16; do
    train $p precision=$p steps=40 lr=5e-3 eval_every=20 schedule=cosine warmup=4
    set -- $(series $p val_loss)
    (($# == 2)) || fail "$p: expected 2 validation losses, got $#"
    is "$p: the loss falls" "$1 < 4 && $2 < $1 - 0.1 && $2 == $(figure $p val_loss)"
    is "$p: perplexity" "sqrt((log($(figure $p perplexity)) - $2)^2) < 1e-9"
    set -- $(series $p loss)
    (($# == 40)) || fail "$p: expected 40 losses, got $#"
    is "$p: first loss of a vocabulary of 256" "$1 > 5.3 && $1 < 5.8 && ${40} < 3"
    [[ $(figure $p overflow_steps) == 0 ]] || fail "$p: overflows"
done
losses() { for p in fp32 bf16 fp16; do figure $p val_loss; done; }
set -- $(losses)
is "storage changes the bits, and little else" "$1 != $2 && $1 != $3 && $2 != $3 && sqrt(($1 - $2)^2) < 0.05 && sqrt(($1 - $3)^2) < 0.05"

# Rates: linear warm-up to 1e-3 in 2 steps, then linearly down to a tenth over the other 8; wsd falls in the last 4 of 10.
train linear steps=10 lr=1e-3 schedule=linear warmup=2 min_lr=0.1
i=0
for rate in $(series linear lr); do
    is "linear: rate of step $i" "sqrt(($rate - ($i < 2 ? ($i + 1) * 5e-4 : 1e-3 - 9e-4 * ($i - 2) / 8))^2) < 1e-9"
    i=$((i + 1))
done
((i == 10)) || fail "linear: $i rates"
train wsd steps=10 lr=1e-3 schedule=wsd warmup=0 decay=0.4 min_lr=0
i=0
for rate in $(series wsd lr); do
    is "wsd: rate of step $i" "sqrt(($rate - ($i < 6 ? 1e-3 : 1e-3 * (1 - ($i - 6) / 4)))^2) < 1e-9"
    i=$((i + 1))
done

# The scale grows after every third good step and not in between, up to its maximum; an overflow halves it and the count begins anew.
train growth precision=fp16 steps=12 loss_scale=4 scale_interval=3 max_scale=16 inject_step=4
[[ $(series growth loss_scale) == "4 4 4 8 8 4 4 4 8 8 8 16" ]] || fail "scales: $(series growth loss_scale)"
[[ $(series growth overflow) == "0 0 0 0 1 0 0 0 0 0 0 0" ]] || fail "overflows: $(series growth overflow)"
is "overflow rate" "$(figure growth overflow_rate) == 1 / 12 && $(figure growth overflow_steps) == 1"
is "average scale" "sqrt(($(figure growth average_scale) - 80 / 12)^2) < 1e-9"
# variance: (6 * 16 + 5 * 64 + 256) / 12 - (80 / 12)^2
is "variance and stability" "sqrt(($(figure growth scale_variance) - (56 - (80 / 12)^2))^2) < 1e-9 && sqrt(($(figure growth scale_stability) - 1 / (1 + (56 - (80 / 12)^2) / (80 / 12)^2))^2) < 1e-9"
h5dump -d /stages/teacher/overflow_events growth/results.h5 | tr -d ' \n' | grep -q '4,0,"wte","inf"' || fail "no row of the overflow"
# Two overflows in a row use up a hysteresis of 2; one good step between them refills it.
train patient precision=fp16 steps=8 loss_scale=64 hysteresis=2 inject_step=1 inject_count=2
[[ $(series patient loss_scale) == "64 64 64 32 32 32 32 32" ]] || fail "scales: $(series patient loss_scale)"
# A fixed scale stays, the bf16 default is 1.
train fixed precision=fp16 loss_scaling=fixed loss_scale=128 steps=3 inject_step=1
[[ $(series fixed loss_scale) == "128 128 128" ]] || fail "scales: $(series fixed loss_scale)"
[[ $(series bf16 loss_scale | cut -d' ' -f1) == 1 ]] || fail "bf16 is scaled"

# Magnitudes: every element of the gradient is counted once at each evaluation, none above the largest; the largest asks for the recommended scale.
train magnitudes precision=fp16 grad_exponents=yes steps=6 eval_every=3
elements=$(figure magnitudes parameters)
set -- $(series magnitudes grad_exponents)
(($# == 2 * 4 * 256)) || fail "histogram of $# cells"
is "elements counted" "$(IFS=+; echo "$*") == 2 * $elements"
for name in fp16_flush_fraction fp16_subnormal_fraction; do
    set -- $(series magnitudes $name)
    (($# == 8)) || fail "$name has $# cells"
done
is "recommended scale" "$(figure magnitudes recommended_scale) * $(figure magnitudes max_abs_grad) <= 32752 && 2 * $(figure magnitudes recommended_scale) * $(figure magnitudes max_abs_grad) > 32752"
exit 0
