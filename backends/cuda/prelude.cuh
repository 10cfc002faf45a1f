// What generated kernels call on a GPU (compute capability 8.0 and later), for NVRTC and nvcc; includes nothing.
// On a CPU another file (ONNXC_EMULATED, tests/emulator/prelude.h) stands for what is the hardware's own.
// "PTX ISA" names a section of NVIDIA's manual of that name.

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef unsigned short f16;   // IEEE binary16 in memory; a float in registers
typedef unsigned short bf16;  // the upper half of a float in memory; a float in registers

#define DEVICE static __device__ __forceinline__

// The bits of a value as another type of the same size.
template <class To, class From> DEVICE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "bits_as changes no size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

#ifdef ONNXC_EMULATED
#include ONNXC_EMULATED
#else
#pragma nv_diag_suppress 177  // a model uses some of these functions only
#ifndef __CUDACC_RTC__
#define ballot ballot_of_warp  // nvcc's own headers have a function ballot
#endif

// N elements that are loaded and stored by one instruction; the address is a multiple of their bytes.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T lane[N];
};

// ---- The block: shared memory, barriers, warp collectives ----

// Start of the block's dynamic shared memory.
DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char block_memory[];
    return block_memory;
}
// Waits for all threads of the block; memory written before is seen by them after.
DEVICE void barrier() { __syncthreads(); }
// Waits for all threads of the warp; memory written before is seen by them after.
DEVICE void warp_barrier() { __syncwarp(); }

#define WHOLE_WARP 0xffffffffu
// The value of lane (own lane ^ mask).
template <class T> DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(WHOLE_WARP, value, mask); }
// The value of lane (own lane + delta), the own one past the last lane.
template <class T> DEVICE T shuffle_down(T value, int delta) { return __shfl_down_sync(WHOLE_WARP, value, delta); }
// The value of lane (own lane - delta), the own one before the first lane.
template <class T> DEVICE T shuffle_up(T value, int delta) { return __shfl_up_sync(WHOLE_WARP, value, delta); }
// The value of lane (lane mod 32).
template <class T> DEVICE T shuffle(T value, int lane) { return __shfl_sync(WHOLE_WARP, value, lane); }
// Bit i is what lane i passed.
DEVICE u32 ballot(bool holds) { return __ballot_sync(WHOLE_WARP, holds); }

// ---- Asynchronous copies, PTX ISA "cp.async" ----

// An address in shared memory as PTX wants it.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
// Starts a copy of 16 bytes, which bypasses L1; where not valid, zeros are written and the source is not read.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0) : "memory");
}
// The same with 8 bytes.
DEVICE void copy_async_8(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 8 : 0) : "memory");
}
// The same with 4 bytes.
DEVICE void copy_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0) : "memory");
}
// Ends a group: the copies that this thread started since its last one.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most PENDING of this thread's latest groups are not complete.
template <int PENDING> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// ---- Tensor cores ----
// PTX ISA "Warp-level matrix load instruction: ldmatrix": matrices of 8 rows of 16 bytes in shared memory. Lane 8*i + r
// names row r of matrix i; register i of lane l receives the two 16-bit elements 2*(l%4), 2*(l%4)+1 of row l/4 of
// matrix i, or, transposed, elements l/4 of rows 2*(l%4), 2*(l%4)+1.

// One matrix; lanes 0-7 name its rows.
DEVICE void load_matrix_x1(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
                 : "=r"(registers[0]) : "r"(shared_address(row)) : "memory");
}
// One matrix, transposed; lanes 0-7 name its rows.
DEVICE void load_matrix_x1_transposed(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(registers[0]) : "r"(shared_address(row)) : "memory");
}
// Two matrices; lanes 0-15 name their rows.
DEVICE void load_matrix_x2(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(shared_address(row)) : "memory");
}
// Two matrices, each transposed; lanes 0-15 name their rows.
DEVICE void load_matrix_x2_transposed(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(shared_address(row)) : "memory");
}
// Four matrices; lanes 0-31 name their rows.
DEVICE void load_matrix_x4(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row)) : "memory");
}
// Four matrices, each transposed; lanes 0-31 name their rows.
DEVICE void load_matrix_x4_transposed(u32* registers, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row)) : "memory");
}

// c[16, 8] += a[16, k] * b[k, 8] by a warp. With g = lane/4, t = lane%4, a register of 32 bits holding p elements of
// neighbouring k (p = 2 of 16 bits, 4 of 8 bits, 1 of tf32), the lowest bits first:
//   a[0], a[1], a[2], a[3]: rows g, g+8, g, g+8; elements k = p*t ... p*t+p-1, for a[2] and a[3] those + 4*p
//   b[0], b[1]: column g; elements k = p*t ... p*t+p-1, for b[1] those + 4*p
//   c[0], c[1], c[2], c[3]: rows g, g, g+8, g+8; columns 2*t, 2*t+1, 2*t, 2*t+1
#define MATRIX_MULTIPLY(SHAPE_AND_TYPES, CONSTRAINT)                                                                 \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"      \
                 : CONSTRAINT(c[0]), CONSTRAINT(c[1]), CONSTRAINT(c[2]), CONSTRAINT(c[3])                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type", f16.
DEVICE void mma_m16n8k16_f16(float* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k16.row.col.f32.f16.f16.f32", "+f");
}
// PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type", bf16.
DEVICE void mma_m16n8k16_bf16(float* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}
// PTX ISA "Matrix Fragments for mma.m16n8k8", tf32: the lower 13 bits of a register are ignored.
DEVICE void mma_m16n8k8_tf32(float* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k8.row.col.f32.tf32.tf32.f32", "+f");
}
// PTX ISA "Matrix Fragments for mma.m16n8k32", a is s8 and b is s8; sums wrap.
DEVICE void mma_m16n8k32_s8s8(i32* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k32.row.col.s32.s8.s8.s32", "+r");
}
// PTX ISA "Matrix Fragments for mma.m16n8k32", a is s8 and b is u8; sums wrap.
DEVICE void mma_m16n8k32_s8u8(i32* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k32.row.col.s32.s8.u8.s32", "+r");
}
// PTX ISA "Matrix Fragments for mma.m16n8k32", a is u8 and b is s8; sums wrap.
DEVICE void mma_m16n8k32_u8s8(i32* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k32.row.col.s32.u8.s8.s32", "+r");
}
// PTX ISA "Matrix Fragments for mma.m16n8k32", a is u8 and b is u8; sums wrap.
DEVICE void mma_m16n8k32_u8u8(i32* c, const u32* a, const u32* b) {
    MATRIX_MULTIPLY("m16n8k32.row.col.s32.u8.u8.s32", "+r");
}

// ---- Narrow floats: all round to nearest, ties to even, unless said otherwise ----

// Exact.
DEVICE float f16_to_f32(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(result) : "h"(value));
    return result;
}
// Exact.
DEVICE float bf16_to_f32(bf16 value) { return bits_as<float>((u32)value << 16); }
// Rounds; overflow is infinite.
DEVICE f16 f32_to_f16(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(result) : "f"(value));
    return result;
}
// Rounds; overflow is infinite.
DEVICE bf16 f32_to_bf16(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(result) : "f"(value));
    return result;
}
// Rounds once.
DEVICE f16 f64_to_f16(double value) {
    f16 result;
    asm("cvt.rn.f16.f64 %0, %1;\n" : "=h"(result) : "d"(value));
    return result;
}
// PTX ISA "mul": with its rounding written down a product is never contracted with a sum.
DEVICE float rounded_product(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;\n" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
DEVICE double rounded_product(double a, double b) {
    double result;
    asm("mul.rn.f64 %0, %1, %2;\n" : "=d"(result) : "d"(a), "d"(b));
    return result;
}
// The bits of an operand of mma_m16n8k8_tf32; rounds to nearest, ties away from zero.
DEVICE u32 f32_to_tf32(float value) {
    u32 result;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(result) : "f"(value));
    return result;
}
// Two f16 in a register.
DEVICE u32 pack_f16(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
// Two bf16 in a register.
DEVICE u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// ---- What the hardware has of arithmetic ----

// The smaller one, NaN where either is; -0 is smaller than 0.
DEVICE float minimum(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
// The smaller one, NaN where either is.
DEVICE double minimum(double a, double b) { return a != a ? a : b != b ? b : fmin(a, b); }
// The greater one, NaN where either is; -0 is smaller than 0.
DEVICE float maximum(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
// The greater one, NaN where either is.
DEVICE double maximum(double a, double b) { return a != a ? a : b != b ? b : fmax(a, b); }
// Rounds towards zero.
DEVICE float f64_to_f32_toward_zero(double value) { return __double2float_rz(value); }
// Bits that are set.
DEVICE int count_bits(u64 value) { return __popcll(value); }
// 2^x to about 2 ulp, subnormal results and arguments as 0.
DEVICE float exp2_estimate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}
// 1 / x to about 1 ulp, subnormal results and arguments as 0.
DEVICE float reciprocal_estimate(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

// ---- Atomic updates by the hardware, relaxed ----

// Replaces *target by update(*target) for elements of 4 or 8 bytes: compare and swap.
template <class Word, class T, class Update> DEVICE void swap_word(T* target, Update update) {
    Word seen = *(volatile Word*)target, expected;
    do {
        expected = seen;
        seen = atomicCAS((Word*)target, expected, bits_as<Word>(update(bits_as<T>(expected))));
    } while (seen != expected);
}
// The same for elements of 1 or 2 bytes, in the aligned word that holds them.
template <class T, class Update> DEVICE void swap_part(T* target, Update update) {
    u32* const word = (u32*)((u64)target & ~3ull);
    const int shift = (int)((u64)target & 3) * 8;
    const u32 mask = (sizeof(T) == 1 ? 0xffu : 0xffffu) << shift;
    u32 seen = *(volatile u32*)word, expected;
    do {
        expected = seen;
        const u32 updated = (u32)update(T(expected >> shift)) << shift;
        seen = atomicCAS(word, expected, (expected & ~mask) | (updated & mask));
    } while (seen != expected);
}
// The same for an element of any size.
template <class T, class Update> DEVICE void atomic_update(T* target, Update update) {
    if constexpr (sizeof(T) == 8) swap_word<u64>(target, update);
    else if constexpr (sizeof(T) == 4) swap_word<u32>(target, update);
    else swap_part(target, update);
}
// The instructions that there are for these types.
DEVICE void atomic_add(float* target, float value) { atomicAdd(target, value); }
DEVICE void atomic_add(double* target, double value) { atomicAdd(target, value); }
DEVICE void atomic_add(i32* target, i32 value) { atomicAdd(target, value); }
DEVICE void atomic_add(u32* target, u32 value) { atomicAdd(target, value); }
DEVICE void atomic_add(i64* target, i64 value) { atomicAdd((u64*)target, (u64)value); }
DEVICE void atomic_add(u64* target, u64 value) { atomicAdd(target, value); }
DEVICE void atomic_min(i32* target, i32 value) { atomicMin(target, value); }
DEVICE void atomic_min(u32* target, u32 value) { atomicMin(target, value); }
DEVICE void atomic_min(i64* target, i64 value) { atomicMin(target, value); }
DEVICE void atomic_min(u64* target, u64 value) { atomicMin(target, value); }
DEVICE void atomic_max(i32* target, i32 value) { atomicMax(target, value); }
DEVICE void atomic_max(u32* target, u32 value) { atomicMax(target, value); }
DEVICE void atomic_max(i64* target, i64 value) { atomicMax(target, value); }
DEVICE void atomic_max(u64* target, u64 value) { atomicMax(target, value); }
#endif  // ONNXC_EMULATED

// ---- Arithmetic with the meaning that the kernel language gives it ----

// Rounds once: first to odd as f32, after which a second rounding is exact (Boldo & Melquiond 2008).
DEVICE bf16 f64_to_bf16(double value) {
    const float toward_zero = f64_to_f32_toward_zero(value);
    const u32 inexact = (double)toward_zero != value;
    return f32_to_bf16(bits_as<float>(bits_as<u32>(toward_zero) | inexact));
}
// To u64, truncated; a negative number wraps as one of i64 does.
template <class T> DEVICE u64 to_u64(T value) {
    return value < T(9223372036854775808.0) ? (u64)(i64)value : (u64)value;
}
// The smaller one.
template <class T> DEVICE T minimum(T a, T b) { return b < a ? b : a; }
// The greater one.
template <class T> DEVICE T maximum(T a, T b) { return a < b ? b : a; }
// Truncating quotient of integers, 0 where the divisor is 0; the least integer divided by -1 is itself.
template <class T> DEVICE T div_or_zero(T a, T b) {
    return b == T(0) ? T(0) : T(-1) < T(0) && b == T(-1) ? T(0 - (u64)a) : T(a / b);
}
// What div_or_zero leaves, with the sign of a; 0 where the divisor is 0.
template <class T> DEVICE T rem_or_zero(T a, T b) {
    return b == T(0) || (T(-1) < T(0) && b == T(-1)) ? T(0) : T(a % b);
}
// a * 2^b, wrapping; 0 where b is negative or the width or more.
template <class T> DEVICE T shift_left(T a, T b) {
    return b < T(0) || (u64)b >= sizeof(T) * 8 ? T(0) : T((u64)a << (int)b);
}
// a / 2^b, rounded down; 0 where b is negative or the width or more.
template <class T> DEVICE T shift_right(T a, T b) {
    return b < T(0) || (u64)b >= sizeof(T) * 8 ? T(0) : T(a >> (int)b);
}
// Quotient rounded down; the divisor is not 0.
template <class T> DEVICE T floor_div(T a, T b) { return a / b - T(a % b != 0 && (a < 0) != (b < 0)); }
// What floor_div leaves, with the sign of b; the divisor is not 0.
template <class T> DEVICE T floor_mod(T a, T b) {
    const T rest = a % b;
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
// Wrapping power of integers; a negative exponent gives the truncated reciprocal, 0 for base 0.
template <class T> DEVICE T power(T base, T exponent) {
    const bool negative = exponent < T(0);
    if (negative && base != T(1) && base != T(-1)) return T(0);
    u64 result = 1, square = (u64)base, left = negative ? 0 - (u64)exponent : (u64)exponent;
    for (; left != 0; left >>= 1, square *= square) result *= left & 1 ? square : 1;
    return T(result);
}
// Bits that are set.
template <class T> DEVICE T popcount(T value) {
    return T(count_bits((u64)value & (~0ull >> (64 - 8 * (int)sizeof(T)))));
}
// 1 / (1 + e^-x), in a form that overflows nowhere.
DEVICE float sigmoid(float x) {
    const float part = expf(-fabsf(x));
    return (x < 0 ? part : 1.0f) * reciprocal_estimate(1.0f + part);  // of a number in [1, 2]: right but for a bit
}
// 1 / (1 + e^-x), in a form that overflows nowhere.
DEVICE double sigmoid(double x) {
    const double part = exp(-fabs(x));
    return (x < 0 ? part : 1.0) / (1.0 + part);
}

// ---- Atomic updates, relaxed; nothing is returned ----

// The value's type may be another than the element's.
template <class T> struct Same {
    typedef T type;
};
// *target += value; integers wrap.
template <class T> DEVICE void atomic_add(T* target, typename Same<T>::type value) {
    atomic_update(target, [=](T old) { return T(old + value); });
}
// *target = minimum(*target, value).
template <class T> DEVICE void atomic_min(T* target, typename Same<T>::type value) {
    atomic_update(target, [=](T old) { return minimum(old, value); });
}
// *target = maximum(*target, value).
template <class T> DEVICE void atomic_max(T* target, typename Same<T>::type value) {
    atomic_update(target, [=](T old) { return maximum(old, value); });
}
// *target *= value; integers wrap.
template <class T> DEVICE void atomic_mul(T* target, typename Same<T>::type value) {
    atomic_update(target, [=](T old) {
        if constexpr (T(0.5) == T(0)) return T((u64)old * (u64)value);
        else return T(old * value);
    });
}

// The same on f16 and bf16, which are the same C++ type: the result of each update is rounded.
#define ATOMICS_OF_HALVES(TYPE)                                                                                      \
    DEVICE void atomic_add_##TYPE(TYPE* target, float value) {                                                       \
        atomic_update(target, [=](TYPE old) { return f32_to_##TYPE(TYPE##_to_f32(old) + value); });                  \
    }                                                                                                                \
    DEVICE void atomic_min_##TYPE(TYPE* target, float value) {                                                       \
        atomic_update(target, [=](TYPE old) { return f32_to_##TYPE(minimum(TYPE##_to_f32(old), value)); });          \
    }                                                                                                                \
    DEVICE void atomic_max_##TYPE(TYPE* target, float value) {                                                       \
        atomic_update(target, [=](TYPE old) { return f32_to_##TYPE(maximum(TYPE##_to_f32(old), value)); });          \
    }                                                                                                                \
    DEVICE void atomic_mul_##TYPE(TYPE* target, float value) {                                                       \
        atomic_update(target, [=](TYPE old) { return f32_to_##TYPE(TYPE##_to_f32(old) * value); });                  \
    }
ATOMICS_OF_HALVES(f16)
ATOMICS_OF_HALVES(bf16)
