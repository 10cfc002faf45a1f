"""Kernels in CUDA C as the compiler writes them, by hand: what the emulator is tested with."""

from __future__ import annotations

RELU = """// from "relu"
extern "C" __global__ void __launch_bounds__(256)
relu(const float* __restrict__ x0, float* __restrict__ y0, int n)
{
    const int block = blockIdx.x;
    const int thread = threadIdx.x;
    const int i = block * 256 + thread;
    if (i < n) {
        y0[i] = maximum(x0[i], 0.0f);
    }
}
"""

WIDE = """extern "C" __global__ void __launch_bounds__(64)
twice(const float* __restrict__ x0, float* __restrict__ y0, i64 n)
{
    const i64 i = ((i64)blockIdx.x * 64 + threadIdx.x) * 4;
    if (i < n) {
        const Pack<float, 4> p1 = *(const Pack<float, 4>*)(x0 + i);
        *(Pack<float, 4>*)(y0 + i) = {{p1.lane[0] * 2.0f, p1.lane[1] * 2.0f, p1.lane[2] * 2.0f, p1.lane[3] * 2.0f}};
    }
}
"""

SOFTMAX = """extern "C" __global__ void __launch_bounds__(128)
softmax(const float* __restrict__ x0, float* __restrict__ y0, int n)
{
    unsigned char* const shared = shared_memory();
    float* const part = (float*)(shared + 0);
    const int thread = threadIdx.x;
    const int row = blockIdx.x * n;
    float top = -bits_as<float>(0x7f800000u);
    for (int i = thread; i < n; i += 128) top = maximum(top, x0[row + i]);
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) top = maximum(top, shuffle_xor(top, step));
    if (thread % 32 == 0) part[thread / 32] = top;
    barrier();
    top = maximum(maximum(part[0], part[1]), maximum(part[2], part[3]));
    float sum = 0.0f;
    for (int i = thread; i < n; i += 128) sum += expf(x0[row + i] - top);
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += shuffle_down(sum, step);
    barrier();  // all have read the maxima
    if (thread % 32 == 0) part[thread / 32] = sum;
    barrier();
    sum = part[0] + part[1] + part[2] + part[3];
    for (int i = thread; i < n; i += 128) y0[row + i] = expf(x0[row + i] - top) / sum;
}
"""

SCATTER = """extern "C" __global__ void __launch_bounds__(128)
scatter(const i32* __restrict__ places, const float* __restrict__ values, float* __restrict__ sums,
        i8* __restrict__ least, f16* __restrict__ halves, i64* __restrict__ products, int n)
{
    const int i = blockIdx.x * 128 + threadIdx.x;
    if (i < n) {
        atomic_add(sums + places[i], values[i]);
        atomic_min(least + places[i], (i8)(i % 256 - 128));
        atomic_add_f16(halves + places[i], 1.0f);
        atomic_mul(products + places[i], (i64)3);
    }
}
"""

NEIGHBOURS = """extern "C" __global__ void __launch_bounds__(64)
neighbours(const float* __restrict__ x0, float* __restrict__ y0)
{
    unsigned char* const shared = shared_memory();
    float* const row = (float*)(shared + 0);
    const int thread = threadIdx.x;
    row[thread] = x0[thread];
    warp_barrier();
    y0[thread] = row[thread / 32 * 32 + (thread + 1) % 32];
}
"""

# c[M, N] = a[M, K] * b[N, K]^T, tiles of 32 x 32 x 64 bytes, two stages; a warp has 16 rows. A row of a tile is four
# pieces of 16 bytes, put where no two of eight consecutive rows have theirs in the same banks.
_GEMM = """extern "C" __global__ void __launch_bounds__(64)
gemm_NAME(const ELEMENT* __restrict__ a, const ELEMENT* __restrict__ b, SUM* __restrict__ c, int m, int n, int k)
{
    unsigned char* const shared = shared_memory();
    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int tiles = (n + 31) / 32;
    const int row = blockIdx.x / tiles * 32;
    const int column = blockIdx.x % tiles * 32;
    const int steps = k / (64 / BYTES);
    SUM sums[16];
    #pragma unroll
    for (int i = 0; i < 16; ++i) sums[i] = 0;
    for (int step = 0; step < steps + 1; ++step) {
        if (step < steps) {
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int piece = i * 64 + thread;
                const int r = piece / 4;
                unsigned char* const to = shared + step % 2 * 4096 + r * 64 + (piece ^ (r / 2)) % 4 * 16;
                const int from = step * (64 / BYTES) + piece % 4 * (16 / BYTES);
                copy_async_16(to, a + (row + r) * k + from, row + r < m);
                copy_async_16(to + 2048, b + (column + r) * k + from, column + r < n);
            }
        }
        copy_async_commit();
        if (step > 0) {
            copy_async_wait<1>();
            barrier();
            const unsigned char* const tile = shared + (step - 1) % 2 * 4096;
            #pragma unroll
            for (int part = 0; part < 2; ++part) {
                u32 left[4];
                const int r = thread / 32 * 16 + lane % 16;
                load_matrix_x4(left, tile + r * 64 + ((part * 2 + lane / 16) ^ (r / 2)) % 4 * 16);
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    u32 right[2];
                    const int q = j * 8 + lane % 8;
                    load_matrix_x2(right, tile + 2048 + q * 64 + ((part * 2 + lane / 8 % 2) ^ (q / 2)) % 4 * 16);
                    MULTIPLY(sums + j * 4, left, right);
                }
            }
            barrier();
        }
    }
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int r = row + thread / 32 * 16 + i % 4 / 2 * 8 + lane / 4;
        const int q = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (r < m && q < n) c[r * n + q] = sums[i];
    }
}
"""

GEMM_TYPES = {
    "f16": ("f16", 2, "float", "mma_m16n8k16_f16"),
    "bf16": ("bf16", 2, "float", "mma_m16n8k16_bf16"),
    "tf32": ("float", 4, "float", "mma_m16n8k8_tf32"),
    "s8s8": ("i8", 1, "i32", "mma_m16n8k32_s8s8"),
    "s8u8": ("i8", 1, "i32", "mma_m16n8k32_s8u8"),
    "u8s8": ("i8", 1, "i32", "mma_m16n8k32_u8s8"),
    "u8u8": ("i8", 1, "i32", "mma_m16n8k32_u8u8"),
}
GEMM_SHARED_BYTES = 8192


def gemm(name: str) -> str:
    """A matrix multiplication on tensor cores; "u8s8" takes the bytes of `a` as unsigned, those of `b` as signed."""
    element, size, total, multiply = GEMM_TYPES[name]
    text = _GEMM.replace("NAME", name).replace("ELEMENT", element).replace("BYTES", str(size))
    return text.replace("SUM", total).replace("MULTIPLY", multiply)


# c[16, 16] = a[16, 16] * b[16, 16] in f16 by one warp, the rows of b as they lie in memory.
TRANSPOSED = """extern "C" __global__ void __launch_bounds__(32)
transposed(const f16* __restrict__ a, const f16* __restrict__ b, float* __restrict__ c)
{
    unsigned char* const shared = shared_memory();
    f16* const left = (f16*)(shared + 0);
    f16* const right = (f16*)(shared + 512);
    const int thread = threadIdx.x;
    *(Pack<f16, 8>*)(left + thread * 8) = *(const Pack<f16, 8>*)(a + thread * 8);
    *(Pack<f16, 8>*)(right + thread * 8) = *(const Pack<f16, 8>*)(b + thread * 8);
    warp_barrier();
    u32 ra[4];
    u32 rb[4];
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    load_matrix_x4(ra, left + thread % 16 * 16 + thread / 16 * 8);
    load_matrix_x4_transposed(rb, right + thread % 16 * 16 + thread / 16 * 8);
    mma_m16n8k16_f16(sums, ra, rb);
    mma_m16n8k16_f16(sums + 4, ra, rb + 2);
    #pragma unroll
    for (int i = 0; i < 8; ++i) c[(thread / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
}
"""
