// The gradient at the entries of a support: out[e] (+)= sum_t left[row(e)][t] * right[col(e)][t].
//
// Both activations have contiguous tokens: rows of `stride` elements, a multiple of 16 bytes, with zeros after the last
// token. A warp sums ENTRIES neighbouring entries over all tokens, in a fixed order. Entries are sorted by row, so
// neighbours mostly share the row of `left`, which is then read once. NVRTC compiles it for one type of value
// (-DVALUE_FP32, -DVALUE_BF16 or -DVALUE_FP16) and of position (-DINDEX=int or -DINDEX="long long").

#if defined(VALUE_FP32)
typedef float Value;
static const int LANES = 4;  // values in a 16-byte load
__device__ __forceinline__ float at(const uint4& v, int n) { return __uint_as_float((&v.x)[n]); }
#else
typedef unsigned short Value;
static const int LANES = 8;
__device__ __forceinline__ float at(const uint4& v, int n) {
    const unsigned int word = (&v.x)[n / 2];
#if defined(VALUE_BF16)
    return __uint_as_float(n % 2 ? word & 0xffff0000u : word << 16);
#else
    const unsigned short half = n % 2 ? (unsigned short)(word >> 16) : (unsigned short)word;
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return f;
#endif
}
#endif

static const int ENTRIES = 4;

extern "C" __global__ void __launch_bounds__(128) support_grad(
    const Value* left, const Value* right, const INDEX* indices, float* out, int entries, int cols, int stride,
    int add) {
    const int lane = threadIdx.x % 32;
    const long long first = ((long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ENTRIES;
    if (first >= entries) return;

    const Value* a[ENTRIES];
    const Value* b[ENTRIES];
    bool same = true;
#pragma unroll
    for (int n = 0; n < ENTRIES; ++n) {
        const long long e = first + n < entries ? first + n : entries - 1;
        const long long index = indices[e];
        const long long row = index / cols;
        a[n] = left + row * stride;
        b[n] = right + (index - row * cols) * stride;
        same = same && a[n] == a[0];
    }
    float total[ENTRIES] = {0.f, 0.f, 0.f, 0.f};
    for (int t = lane * LANES; t < stride; t += 32 * LANES) {
        uint4 x = *reinterpret_cast<const uint4*>(a[0] + t);
        uint4 y[ENTRIES];
#pragma unroll
        for (int n = 0; n < ENTRIES; ++n) y[n] = *reinterpret_cast<const uint4*>(b[n] + t);
#pragma unroll
        for (int n = 0; n < ENTRIES; ++n) {
            if (!same) x = *reinterpret_cast<const uint4*>(a[n] + t);
#pragma unroll
            for (int i = 0; i < LANES; ++i) total[n] = fmaf(at(x, i), at(y[n], i), total[n]);
        }
    }
#pragma unroll
    for (int n = 0; n < ENTRIES; ++n) {
#pragma unroll
        for (int step = 16; step; step /= 2) total[n] += __shfl_xor_sync(0xffffffffu, total[n], step);
        if (lane == n && first + n < entries) out[first + n] = (add ? out[first + n] : 0.f) + total[n];
    }
}
