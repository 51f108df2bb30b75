// Writing entries of weights at sorted, unique flat positions.
//
// No two threads touch the same entry, so nothing is atomic and every run gives the same bits. Compiled at run time by
// NVRTC for one type of weight (-DWEIGHT_FP32, -DWEIGHT_BF16 or -DWEIGHT_FP16) and of position (-DINDEX=int or
// -DINDEX="long long"); no header is needed. The conversions are written out for that reason.

#if defined(WEIGHT_FP32)
typedef float Weight;
typedef float4 Weight4;
__device__ __forceinline__ float widen(Weight w) { return w; }
__device__ __forceinline__ Weight narrow(float f) { return f; }
#else
typedef unsigned short Weight;
typedef ushort4 Weight4;
#if defined(WEIGHT_BF16)
__device__ __forceinline__ float widen(Weight w) { return __uint_as_float((unsigned int)w << 16); }
__device__ __forceinline__ Weight narrow(float f) {
    unsigned int bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Weight)((bits >> 16) | 0x40u);  // NaN stays NaN
    return (Weight)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // nearest, ties to even
}
#else
__device__ __forceinline__ float widen(Weight w) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(w));
    return f;
}
__device__ __forceinline__ Weight narrow(float f) {
    Weight w;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(w) : "f"(f));
    return w;
}
#endif
#endif

struct __align__(16) Index4 { INDEX x, y, z, w; };
static const int PER_THREAD = 4;

__device__ __forceinline__ bool aligned(const void* pointer, int bytes) {
    return ((unsigned long long)pointer & (bytes - 1)) == 0;
}

// weight[indices[e]] = round(weight[indices[e]] + values[e])
extern "C" __global__ void scatter_add(Weight* weight, const INDEX* indices, const float* values, int entries) {
    long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (e + PER_THREAD <= entries && aligned(indices, 16) && aligned(values, 16)) {
        Index4 i = *reinterpret_cast<const Index4*>(indices + e);
        float4 v = *reinterpret_cast<const float4*>(values + e);
        // four independent loads in flight before the first is used
        Weight a = weight[i.x], b = weight[i.y], c = weight[i.z], d = weight[i.w];
        weight[i.x] = narrow(widen(a) + v.x);
        weight[i.y] = narrow(widen(b) + v.y);
        weight[i.z] = narrow(widen(c) + v.z);
        weight[i.w] = narrow(widen(d) + v.w);
        return;
    }
    for (int n = 0; n < PER_THREAD && e + n < entries; ++n)
        weight[indices[e + n]] = narrow(widen(weight[indices[e + n]]) + values[e + n]);
}

enum Mode { RESYNC = 0, TAKE = 1, RESTORE = 2 };

// For each tensor, blockIdx.y, of the table (rows: weights, indices, originals, values, numbers of entries):
//   RESYNC   weight[i] = round(original + value)
//   TAKE     original = weight[i]
//   RESTORE  weight[i] = original
extern "C" __global__ void write_many(const long long* table, int tensors, int mode) {
    const int t = blockIdx.y;
    const long long entries = table[4LL * tensors + t];
    const long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (e >= entries) return;
    Weight* weight = reinterpret_cast<Weight*>(table[t]);
    const INDEX* indices = reinterpret_cast<const INDEX*>(table[tensors + t]);
    Weight* originals = reinterpret_cast<Weight*>(table[2LL * tensors + t]);
    const float* values = reinterpret_cast<const float*>(table[3LL * tensors + t]);

    const bool whole = e + PER_THREAD <= entries && aligned(indices, 16) && aligned(originals, sizeof(Weight4)) &&
                       (mode != RESYNC || aligned(values, 16));
    if (!whole) {
        for (int n = 0; n < PER_THREAD && e + n < entries; ++n) {
            const INDEX i = indices[e + n];
            if (mode == TAKE)
                originals[e + n] = weight[i];
            else
                weight[i] = mode == RESTORE ? originals[e + n] : narrow(widen(originals[e + n]) + values[e + n]);
        }
        return;
    }
    const Index4 i = *reinterpret_cast<const Index4*>(indices + e);
    Weight4 o;
    if (mode == TAKE) {
        o.x = weight[i.x];
        o.y = weight[i.y];
        o.z = weight[i.z];
        o.w = weight[i.w];
        *reinterpret_cast<Weight4*>(originals + e) = o;
        return;
    }
    o = *reinterpret_cast<const Weight4*>(originals + e);
    if (mode == RESYNC) {
        const float4 v = *reinterpret_cast<const float4*>(values + e);
        o.x = narrow(widen(o.x) + v.x);
        o.y = narrow(widen(o.y) + v.y);
        o.z = narrow(widen(o.z) + v.z);
        o.w = narrow(widen(o.w) + v.w);
    }
    weight[i.x] = o.x;
    weight[i.y] = o.y;
    weight[i.z] = o.z;
    weight[i.w] = o.w;
}
