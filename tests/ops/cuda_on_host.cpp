// Just enough of CUDA C++ to compile this package's kernels with a host compiler and run them, a thread at a time or,
// where a warp exchanges values, a thread of the host for each lane. KERNELS is the file; the types are defined as for
// NVRTC.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

struct Dim { int x = 0, y = 0, z = 0; };
static thread_local Dim blockIdx, threadIdx;
static Dim blockDim;

struct float4 { float x, y, z, w; };
struct ushort4 { unsigned short x, y, z, w; };
struct uint4 { unsigned int x, y, z, w; };

static float __uint_as_float(unsigned int bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static unsigned int __float_as_uint(float f) { unsigned int bits; std::memcpy(&bits, &f, 4); return bits; }
static float fmaf_(float a, float b, float c) { return std::fma(a, b, c); }
#define fmaf fmaf_

static float lanes[32];
static std::barrier<>* warp;
static float __shfl_xor_sync(unsigned int, float value, int other) {
    const int lane = threadIdx.x % 32;
    lanes[lane] = value;
    warp->arrive_and_wait();
    const float theirs = lanes[lane ^ other];
    warp->arrive_and_wait();
    return theirs;
}

#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(n)

#include KERNELS

template <class Kernel> static void every_thread(int grid_x, int grid_y, int threads, Kernel kernel) {
    blockDim.x = threads;
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x)
            for (int t = 0; t < threads; ++t) {
                blockIdx.x = x, blockIdx.y = y, threadIdx.x = t;
                kernel();
            }
}

#ifdef HAS_WARPS
extern "C" void run_support_grad(int grid, int threads, const Value* left, const Value* right, const INDEX* indices, float* out,
                          int entries, int cols, int stride, int add) {
    blockDim.x = threads;
    for (int x = 0; x < grid; ++x)
        for (int w = 0; w < threads / 32; ++w) {
            std::barrier<> together(32);
            warp = &together;
            std::vector<std::thread> all;
            for (int lane = 0; lane < 32; ++lane)
                all.emplace_back([=] {
                    blockIdx.x = x, threadIdx.x = 32 * w + lane;
                    support_grad(left, right, indices, out, entries, cols, stride, add);
                });
            for (auto& thread : all) thread.join();
        }
}
#else
extern "C" void run_scatter_add(int grid, int threads, Weight* weight, const INDEX* indices, const float* values,
                                int entries) {
    every_thread(grid, 1, threads, [=] { scatter_add(weight, indices, values, entries); });
}
extern "C" void run_write_many(int grid, int threads, const long long* table, int tensors, int mode) {
    every_thread(grid, tensors, threads, [=] { write_many(table, tensors, mode); });
}
#endif
