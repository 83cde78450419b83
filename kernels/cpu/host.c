/* The CPU back end as a device: choice of the instruction set, memory, scratch, description.
 * Refuses an instruction set that the processor lacks, also when the environment asks for it. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* CPL_CPU_VARIANTS(X): what kernels/cpu/CMakeLists.txt built, best first. */
#if defined(CPL_CPU_V4)
#define CPL_CPU_VARIANTS(X) X(v4) X(v3) X(base)
#elif defined(CPL_CPU_V3)
#define CPL_CPU_VARIANTS(X) X(v3) X(base)
#else
#define CPL_CPU_VARIANTS(X) X(base)
#endif

#define CPL_DECLARE(isa) extern const cpl_ops cpl_cpu_##isa##_ops;
CPL_CPU_VARIANTS(CPL_DECLARE)
#undef CPL_DECLARE

typedef struct {
    const char *isa;
    const cpl_ops *ops;
} variant;
static const variant variants[] = {
#define CPL_VARIANT(isa) {#isa, &cpl_cpu_##isa##_ops},
    CPL_CPU_VARIANTS(CPL_VARIANT)
#undef CPL_VARIANT
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

#if defined(__x86_64__)
/* What compilers do not all know by name: F16C and MOVBE (leaf 1), LZCNT (leaf 0x80000001, ecx bit 5). */
static bool has_rest_of_v3(void) {
    unsigned eax;
    unsigned ebx;
    unsigned ecx;
    unsigned edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & (unsigned)bit_F16C) == 0 || (ecx & (unsigned)bit_MOVBE) == 0) {
        return false;
    }
    return __get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 5)) != 0;
}
#endif

/* The x86-64 micro-architecture levels, as far as the operations use them. */
static bool runs_here(const char *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && has_rest_of_v3();
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(isa, "v4") == 0) {
        return v4;
    }
    if (strcmp(isa, "v3") == 0) {
        return v3;
    }
#endif
    return strcmp(isa, "base") == 0;
}

static cpl_status choose_variant(const variant **out) {
    cpl_status st = CPL_OK;
    const char *wanted = getenv("CUPEL_CPU");
    for (int i = 0; i < VARIANTS; i++) {
        if (wanted == NULL ? runs_here(variants[i].isa) : strcmp(wanted, variants[i].isa) == 0) {
            *out = &variants[i];
            break;
        }
    }
    if (*out == NULL || !runs_here((*out)->isa)) {
        CPL_FAIL(CPL_UNSUPPORTED, "CUPEL_CPU=%s in the environment: expected base, v3 or v4, built in and known to this processor",
                 wanted);
    }
done:
    return st;
}

/* "model name" of /proc/cpuinfo, or the architecture. */
static void processor_name(char *name, size_t size) {
    char line[256];
    struct utsname system;
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(name, size, "%s", uname(&system) == 0 ? system.machine : "CPU");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            colon[1 + strcspn(colon + 1, "\n")] = '\0';
            snprintf(name, size, "%s", colon + 1 + strspn(colon + 1, " "));
            break;
        }
    }
    if (f != NULL) {
        fclose(f);
    }
}

static cpl_status cpu_open(cpl_device *dev, int gpu, int threads) {
    cpl_status st = CPL_OK;
    cpl_cpu *cpu = NULL;
    const variant *chosen = NULL;
    CPL_TRY(choose_variant(&chosen));
    CPL_TRY(cpl_alloc(&cpu, 1, sizeof *cpu, "CPU device"));
    cpu->threads = threads;
    cpu->isa = chosen->isa;
    dev->impl = cpu;
    dev->ops = chosen->ops;
    processor_name(dev->name, sizeof dev->name);
done:
    return st;
}

static void cpu_close(cpl_device *dev) {
    cpl_cpu *cpu = dev->impl;
    cpl_rapl_close(&cpu->rapl);
    for (int i = 0; i < CPL_SCRATCH_COUNT; i++) {
        cpl_free(&cpu->scratch[i]);
    }
    cpl_free(&dev->impl);
}

static cpl_status cpu_alloc(cpl_device *dev, void **out, size_t bytes, const char *what) {
    return cpl_alloc(out, bytes, 1, what);
}

static void cpu_free(cpl_device *dev, void *memory, size_t bytes) {
    cpl_free(&memory);
}

static int cpu_threads(const cpl_device *dev) {
    return cpl_cpu_threads(dev);
}

cpl_status cpl_cpu_scratch(cpl_device *dev, int slot, size_t bytes, void *out) {
    cpl_status st = CPL_OK;
    cpl_cpu *cpu = dev->impl;
    if (bytes > cpu->scratch_bytes[slot]) {
        size_t rounded;
        if (!cpl_add_size(bytes, 4095, &rounded)) {
            CPL_FAIL(CPL_NO_MEMORY, "scratch memory of %zu bytes does not fit the address space", bytes);
        }
        rounded = rounded / 4096 * 4096;
        cpl_free(&cpu->scratch[slot]);
        cpu->scratch_bytes[slot] = 0;
        CPL_TRY(cpl_alloc(&cpu->scratch[slot], rounded, 1, "scratch memory of the CPU operations"));
        cpu->scratch_bytes[slot] = rounded;
    }
    memcpy(out, &cpu->scratch[slot], sizeof(void *));
done:
    return st;
}

static void cpu_describe(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to) {
    const cpl_cpu *cpu = dev->impl;
    char text[160];
    size_t used = 0;
    used += (size_t)snprintf(text, sizeof text, "%s of", cpu->isa);
    for (int i = 0; i < VARIANTS; i++) {
        used += (size_t)snprintf(text + used, sizeof text - used, " %s%s", variants[i].isa,
                                 runs_here(variants[i].isa) ? "" : " (not on this processor)");
    }
    line("instruction set", text, to);
    cpl_gemm_library(text, sizeof text);
    line("matrix library", text, to);
    line("bf16 products", cpl_gemm_has_bf16() ? "native, sums in fp32" : "widened to fp32", to);
    line("fp16 products", "widened to fp32", to);
    snprintf(text, sizeof text, "%d", cpu->threads);
    line("threads", text, to);
    cpl_rapl_describe(text, sizeof text);
    line("energy", text, to);
}

/* Scratch memory of the operations is not counted as the device's. */
static int64_t cpu_pass_bytes(const cpl_pass *pass) {
    return 0;
}

static void cpu_energy(cpl_device *dev, cpl_energy *out) {
    cpl_cpu *cpu = dev->impl;
    cpl_rapl_read(&cpu->rapl, out);
}

const cpl_backend cpl_cpu_backend = {
    .kind = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .energy = cpu_energy,
    .pass_bytes = cpu_pass_bytes,
    .threads = cpu_threads,
    .describe = cpu_describe,
};
