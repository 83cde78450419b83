/* GELU in its tanh form and its derivative. Hendrycks & Gimpel 2016, arXiv:1606.08415.
 * Refuses overflow: both go through e^-2|u| <= 1, u = sqrt(2/pi) (x + 0.044715 x^3). */
#ifndef CPL_KERNELS_CUDA_ELEMENTARY_CUH
#define CPL_KERNELS_CUDA_ELEMENTARY_CUH

/* 2 log2(e) sqrt(2/pi) and 0.044715 times that, so that e^-2u = 2^-(x (A + B x^2)); exp2f has 2 units in the last place. */
#define CPL_GELU_2U_LOG2E  2.302208198f
#define CPL_GELU_2U_LOG2E3 0.1029432397f

__device__ __forceinline__ float cpl_gelu(float x) {
    float e = exp2f(-fabsf(x * fmaf(x * x, CPL_GELU_2U_LOG2E3, CPL_GELU_2U_LOG2E)));
    return __fdividef(x < 0.0f ? x * e : x, 1.0f + e);
}

/* s + x 2u' s (1 - s), s = 1/(1 + e^-2u). Beyond |x| = 16 it is 0 or 1; the clamp keeps x^3 finite. */
__device__ __forceinline__ float cpl_gelu_grad(float x) {
    float a = fminf(fabsf(x), 16.0f);
    a = isnan(x) ? x : a;
    float e = exp2f(-(a * fmaf(a * a, CPL_GELU_2U_LOG2E3, CPL_GELU_2U_LOG2E)));
    float near = __fdividef(1.0f, 1.0f + e), far = e * near;
    float bend = a * fmaf(a * a, 0.21406444881f, 1.59576912161f) * (near * far);
    return x < 0.0f ? far - bend : near + bend;
}

#endif
