#!/usr/bin/env python3
"""Writes gpt2_small.h: losses, gradients and parameters of a small odd-shaped GPT-2 from PyTorch autograd in float64.

Refuses to share code with cupel: weights and tokens come from the hash below, repeated in tests/support/golden.h.
    python3 make_golden.py > gpt2_small.h        (needs torch alone; the version used stands in the header)
"""
import torch
import torch.nn.functional as F

STUDENT = dict(layers=2, heads=3, width=21, context=13, vocab=37)
TEACHER = dict(layers=1, heads=2, width=10, context=13, vocab=37)
B, SAMPLES, TEMPERATURE, ALPHA, BETA = 2, 16, 2.5, 0.7, 0.3
STEPS, MICRO_BATCHES, CLIP, DECAY, BETA1, BETA2, EPS = 3, 2, 0.25, 0.1, 0.9, 0.95, 1e-5
RATES = [1e-2, 5e-3, 2e-3]
M32 = 0xFFFFFFFF
torch.set_default_dtype(torch.float64)


def mix(stream, i):
    """32 bits, a function of a stream's number and an index (the finalizer of xxHash32)."""
    x = (i * 2654435761 + stream * 2246822519 + 374761393) & M32
    x ^= x >> 15
    x = x * 2246822519 & M32
    x ^= x >> 13
    x = x * 3266489917 & M32
    return x ^ x >> 16


def uniform(stream, n):
    """n values in [-1/2, 1/2), multiples of 2^-24."""
    return torch.tensor([(mix(stream, i) >> 8) / 2**24 - 0.5 for i in range(n)])


def shapes(s):
    """Name, shape and (mean, amplitude) in the order of cupel's flat buffers: matrices, then vectors."""
    C, out = s["width"], [("wte", (s["vocab"], s["width"]), 0, 1.0), ("wpe", (s["context"], s["width"]), 0, 0.5)]
    for i in range(s["layers"]):
        out += [(f"h.{i}.{n}", sh, 0, 0.5) for n, sh in [("attn.qkv.weight", (3 * C, C)), ("attn.proj.weight", (C, C)),
                                                         ("mlp.fc.weight", (4 * C, C)), ("mlp.out.weight", (C, 4 * C))]]
    for i in range(s["layers"]):
        out += [(f"h.{i}.{n}", (k * C,), m, a) for n, k, m, a in [
            ("ln1.gain", 1, 1, 0.5), ("ln1.bias", 1, 0, 0.25), ("attn.qkv.bias", 3, 0, 0.25), ("attn.proj.bias", 1, 0, 0.25),
            ("ln2.gain", 1, 1, 0.5), ("ln2.bias", 1, 0, 0.25), ("mlp.fc.bias", 4, 0, 0.25), ("mlp.out.bias", 1, 0, 0.25)]]
    return out + [("ln_f.gain", (C,), 1, 0.5), ("ln_f.bias", (C,), 0, 0.25)]


def parameters(s, stream):
    """Values are rounded to float32, so that both sides start from the same numbers."""
    p = {}
    for t, (name, shape, mean, amplitude) in enumerate(shapes(s)):
        n = torch.Size(shape).numel()
        p[name] = (mean + amplitude * uniform(stream + t, n)).float().double().reshape(shape).requires_grad_()
    return p


def batch(s, number):
    """Tokens [B,T], targets [B,T] shifted by one; about one target in seven is -100 (ignored)."""
    T, V = s["context"], s["vocab"]
    ids = torch.tensor([[mix(900 + number, b * (T + 1) + t) % V for t in range(T + 1)] for b in range(B)])
    ignored = torch.tensor([[mix(800 + number, b * T + t) % 7 == 0 for t in range(T)] for b in range(B)])
    return ids[:, :-1], ids[:, 1:].masked_fill(ignored, -100)


def logits(p, s, tokens):
    C, H, T = s["width"], s["heads"], tokens.shape[1]
    x = p["wte"][tokens] + p["wpe"][:T]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for i in range(s["layers"]):
        w = {n[len(f"h.{i}."):]: v for n, v in p.items() if n.startswith(f"h.{i}.")}
        qkv = F.linear(F.layer_norm(x, (C,), w["ln1.gain"], w["ln1.bias"], 1e-5), w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = (z.view(B, T, H, C // H).transpose(1, 2) for z in qkv.split(C, 2))
        scores = (q @ k.transpose(2, 3) / (C // H) ** 0.5).masked_fill(~causal, float("-inf"))
        x = x + F.linear((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, C), w["attn.proj.weight"], w["attn.proj.bias"])
        h = F.linear(F.layer_norm(x, (C,), w["ln2.gain"], w["ln2.bias"], 1e-5), w["mlp.fc.weight"], w["mlp.fc.bias"])
        x = x + F.linear(F.gelu(h, approximate="tanh"), w["mlp.out.weight"], w["mlp.out.bias"])
    return F.linear(F.layer_norm(x, (C,), p["ln_f.gain"], p["ln_f.bias"], 1e-5), p["wte"])


def distillation(student, teacher, targets, kind):
    """Means over valid tokens of (soft, hard)."""
    valid = targets.flatten() != -100
    z, zt = student.flatten(0, 1)[valid], teacher.flatten(0, 1)[valid]
    logq, logp = (z / TEMPERATURE).log_softmax(1), (zt / TEMPERATURE).log_softmax(1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(1)
    if kind == "jsd":
        logm = (BETA * logp.exp() + (1 - BETA) * logq.exp()).log()
        soft = BETA * kl(logp, logm) + (1 - BETA) * kl(logq, logm)
    else:
        soft = kl(logp, logq) if kind == "forward_kl" else kl(logq, logp)
    return soft.mean(), F.cross_entropy(z, targets.flatten()[valid])


def table(name, tensors):
    print(f"static const golden_tensor {name}[] = {{")
    for t, (tensor, v) in enumerate(tensors.items()):
        v = v.detach().flatten()
        n = v.numel()
        sampled = ", ".join(f"{v[j * n // SAMPLES].item():.9g}" for j in range(SAMPLES))
        print(f'    {{"{tensor}", {v.norm().item():.12g}, {(v * uniform(500 + t, n)).sum().item():.12g}, {{{sampled}}}}},')
    print("};")


def shape_line(name, s):
    print(f"static const cpl_model_shape {name} = {{" + ", ".join(f".{k} = {v}" for k, v in s.items()) + "};")


def main():
    print(f"""/* Reference values of a small GPT-2 in float64: written by tests/golden/make_golden.py with PyTorch {torch.__version__.split('+')[0]}.
 * Refuses to be edited: change the script and run it again. Sample j of a tensor of n elements is element j * n / {SAMPLES}. */
/* clang-format off */
enum {{ GOLDEN_B = {B}, GOLDEN_STEPS = {STEPS}, GOLDEN_MICRO_BATCHES = {MICRO_BATCHES} }};""")
    shape_line("golden_student", STUDENT)
    shape_line("golden_teacher", TEACHER)
    print(f"static const float golden_temperature = {TEMPERATURE}f, golden_alpha = {ALPHA}f, golden_beta = {BETA}f;")
    print(f"static const float golden_clip = {CLIP}f, golden_decay = {DECAY}f, golden_beta1 = {BETA1}f, golden_beta2 = {BETA2}f, "
          f"golden_eps = {EPS}f;")
    print("static const float golden_rates[] = {" + ", ".join(f"{r}f" for r in RATES) + "};")

    p, (tokens, targets) = parameters(STUDENT, 0), batch(STUDENT, 0)
    z = logits(p, STUDENT, tokens)
    rows = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none")
    loss = F.cross_entropy(z.flatten(0, 1), targets.flatten())
    loss.backward()
    print(f"static const double golden_loss = {loss.item():.15g};")
    print("static const double golden_rows[] = {" + ", ".join(f"{r:.12g}" for r in rows.tolist()) + "};")
    table("golden_gradient", {n: v.grad for n, v in p.items()})

    teacher = logits(parameters(TEACHER, 100), TEACHER, tokens).detach()
    for kind in ["forward_kl", "reverse_kl", "jsd"]:
        p = parameters(STUDENT, 0)
        soft, hard = distillation(logits(p, STUDENT, tokens), teacher, targets, kind)
        (ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard).backward()
        print(f"static const double golden_{kind}_soft = {soft.item():.15g}, golden_{kind}_hard = {hard.item():.15g};")
        table(f"golden_{kind}", {n: v.grad for n, v in p.items()})

    p = parameters(STUDENT, 0)
    groups = [dict(params=[v for v in p.values() if v.dim() == 2], weight_decay=DECAY),
              dict(params=[v for v in p.values() if v.dim() == 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for g in optimizer.param_groups:
            g["lr"] = RATES[step]
        losses.append(0.0)
        for m in range(MICRO_BATCHES):
            tokens, targets = batch(STUDENT, 10 + step * MICRO_BATCHES + m)
            loss = F.cross_entropy(logits(p, STUDENT, tokens).flatten(0, 1), targets.flatten()) / MICRO_BATCHES
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), CLIP).item())
        optimizer.step()
    print("static const double golden_step_loss[] = {" + ", ".join(f"{x:.12g}" for x in losses) + "};")
    print("static const double golden_step_norm[] = {" + ", ".join(f"{x:.12g}" for x in norms) + "};")
    table("golden_updated", p)


main()
