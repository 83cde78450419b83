/* GELU in its tanh form and its derivative, by the sigmoid s of 2u, u = sqrt(2/pi) (x + 0.044715 x^3): x s, and
 * s (1 + 2u' x (1 - s)). Hendrycks & Gimpel 2016, arXiv:1606.08415. Refuses tables and polynomials: both instructions have 2 units
 * in the last place. */
#ifndef CPL_KERNELS_CUDA_ELEMENTARY_CUH
#define CPL_KERNELS_CUDA_ELEMENTARY_CUH

/* 2^x and 1/x, subnormals as 0. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / (1 + e^-2u): e^-2u = 2^-(x (A + B x^2)), A = 2 log2(e) sqrt(2/pi), B = 0.044715 A. */
__device__ __forceinline__ float cpl_gelu_sigmoid(float x) {
    return inverse_fast(1.0f + exp2_fast(-x * fmaf(x * x, 0.1029432397f, 2.302208198f)));
}

__device__ __forceinline__ float cpl_gelu(float x) {
    return x * cpl_gelu_sigmoid(x);
}

/* Beyond 16 the sigmoid is 0 or 1; the clamp, which lets NaN through, keeps x^3 finite. */
__device__ __forceinline__ float cpl_gelu_grad(float x) {
    asm("min.NaN.f32 %0, %1, 0f41800000;" : "=f"(x) : "f"(x));
    asm("max.NaN.f32 %0, %1, 0fC1800000;" : "=f"(x) : "f"(x));
    float s = cpl_gelu_sigmoid(x), slope = x * fmaf(x * x, 0.21406444881f, 1.59576912161f);
    return s * fmaf(slope, 1.0f - s, 1.0f);
}

#endif
