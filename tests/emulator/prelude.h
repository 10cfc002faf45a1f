// The hardware's own functions of backends/cuda/prelude.cuh, which includes this file, for a CPU.
#pragma once

// Vectors are loaded by the copy constructor and stored by the assignment, which see whether the address is aligned.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T lane[N];

    Pack() = default;
    Pack(const T (&lanes)[N]) { memcpy(lane, lanes, sizeof lane); }
    Pack(const Pack& source) {
        source.require_aligned("read");
        memcpy(lane, source.lane, sizeof lane);
    }
    Pack& operator=(const Pack& source) {
        require_aligned("write");
        memcpy(lane, source.lane, sizeof lane);
        return *this;
    }
    void require_aligned(const char* what) const {
        unsigned long address = (unsigned long)this;
        asm("" : "+r"(address));  // the compiler takes the alignment of a type for granted
        if (address % sizeof(Pack) != 0) emulator_misaligned(this, sizeof(Pack), what);
    }
};

// ---- The block ----

DEVICE unsigned char* shared_memory() { return emulator_here().shared; }
DEVICE void barrier(int line = __builtin_LINE()) { emulator_barrier(line); }
DEVICE void warp_barrier(int line = __builtin_LINE()) { emulator_warp_barrier(line); }

template <class T> DEVICE T shuffled(EmulatorCollective kind, T value, int argument, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles are of 4 or 8 bytes");
    T result;
    emulator_shuffle(kind, &value, &result, sizeof(T), argument, line);
    return result;
}
template <class T> DEVICE T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
    return shuffled(EMULATOR_SHUFFLE_XOR, value, mask, line);
}
template <class T> DEVICE T shuffle_down(T value, int delta, int line = __builtin_LINE()) {
    return shuffled(EMULATOR_SHUFFLE_DOWN, value, delta, line);
}
template <class T> DEVICE T shuffle_up(T value, int delta, int line = __builtin_LINE()) {
    return shuffled(EMULATOR_SHUFFLE_UP, value, delta, line);
}
template <class T> DEVICE T shuffle(T value, int lane, int line = __builtin_LINE()) {
    return shuffled(EMULATOR_SHUFFLE, value, lane, line);
}
DEVICE u32 ballot(bool holds, int line = __builtin_LINE()) { return emulator_ballot(holds, line); }

DEVICE void copy_async_16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    emulator_copy_async(shared, global, 16, valid, line);
}
DEVICE void copy_async_8(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    emulator_copy_async(shared, global, 8, valid, line);
}
DEVICE void copy_async_4(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    emulator_copy_async(shared, global, 4, valid, line);
}
DEVICE void copy_async_commit() { emulator_copy_async_commit(); }
template <int PENDING> DEVICE void copy_async_wait() { emulator_copy_async_wait(PENDING); }

// ---- Tensor cores ----

#define LOAD_MATRIX(suffix, matrices, kind)                                                                          \
    DEVICE void load_matrix_##suffix(u32* registers, const void* row, int line = __builtin_LINE()) {                 \
        emulator_load_matrix(kind, registers, row, matrices, line);                                                  \
    }
LOAD_MATRIX(x1, 1, EMULATOR_LOAD_MATRIX)
LOAD_MATRIX(x2, 2, EMULATOR_LOAD_MATRIX)
LOAD_MATRIX(x4, 4, EMULATOR_LOAD_MATRIX)
LOAD_MATRIX(x1_transposed, 1, EMULATOR_LOAD_MATRIX_TRANSPOSED)
LOAD_MATRIX(x2_transposed, 2, EMULATOR_LOAD_MATRIX_TRANSPOSED)
LOAD_MATRIX(x4_transposed, 4, EMULATOR_LOAD_MATRIX_TRANSPOSED)

#define MATRIX_MULTIPLY(name, Sum, kind)                                                                             \
    DEVICE void name(Sum* c, const u32* a, const u32* b, int line = __builtin_LINE()) {                              \
        emulator_multiply(kind, c, a, b, line);                                                                      \
    }
MATRIX_MULTIPLY(mma_m16n8k16_f16, float, EMULATOR_MULTIPLY_F16)
MATRIX_MULTIPLY(mma_m16n8k16_bf16, float, EMULATOR_MULTIPLY_BF16)
MATRIX_MULTIPLY(mma_m16n8k8_tf32, float, EMULATOR_MULTIPLY_TF32)
MATRIX_MULTIPLY(mma_m16n8k32_s8s8, i32, EMULATOR_MULTIPLY_S8S8)
MATRIX_MULTIPLY(mma_m16n8k32_s8u8, i32, EMULATOR_MULTIPLY_S8U8)
MATRIX_MULTIPLY(mma_m16n8k32_u8s8, i32, EMULATOR_MULTIPLY_U8S8)
MATRIX_MULTIPLY(mma_m16n8k32_u8u8, i32, EMULATOR_MULTIPLY_U8U8)

// ---- Narrow floats ----

DEVICE float bf16_to_f32(bf16 value) { return bits_as<float>((u32)value << 16); }
DEVICE bf16 f32_to_bf16(float value) {
    const u32 bits = bits_as<u32>(value);
    return value != value ? 0x7fff : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#ifdef __F16C__
typedef short EmulatorHalves __attribute__((vector_size(16)));
typedef float EmulatorFloats __attribute__((vector_size(16)));
DEVICE float f16_to_f32(f16 value) {
    return __builtin_ia32_vcvtph2ps(EmulatorHalves{(short)value, 0, 0, 0, 0, 0, 0, 0})[0];
}
DEVICE f16 f32_to_f16(float value) {
    return (f16)__builtin_ia32_vcvtps2ph(EmulatorFloats{value, 0, 0, 0}, 0)[0];
}
#else
DEVICE float f16_to_f32(f16 value) {
    const u32 sign = (u32)(value & 0x8000) << 16, magnitude = value & 0x7fff;
    // Exponents of f16 are 112 less biased; the product also makes subnormal numbers normal.
    const float scaled = bits_as<float>(magnitude << 13) * bits_as<float>(0x77800000u);
    const u32 bits = magnitude >= 0x7c00 ? 0x7f800000u | magnitude << 13 : bits_as<u32>(scaled);
    return bits_as<float>(sign | bits);
}
DEVICE f16 f32_to_f16(float value) {
    const u32 bits = bits_as<u32>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return (f16)(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return (f16)(sign | 0x7c00);
    if (magnitude < 0x38800000u)  // subnormal: the sum's last bit is worth the least f16
        return (f16)(sign | (bits_as<u32>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u));
    return (f16)(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
#endif
DEVICE float f64_to_f32_toward_zero(double value) {
    const float nearest = (float)value;
    const bool beyond = (nearest < 0 ? -(double)nearest : (double)nearest) > (value < 0 ? -value : value);
    return bits_as<float>(bits_as<u32>(nearest) - beyond);
}
DEVICE f16 f64_to_f16(double value) {
    // Through f32 rounded to odd: the second rounding is then exact (Boldo & Melquiond 2008).
    const float toward_zero = f64_to_f32_toward_zero(value);
    return f32_to_f16(bits_as<float>(bits_as<u32>(toward_zero) | ((double)toward_zero != value)));
}
DEVICE float rounded_product(float a, float b) { return a * b; }
DEVICE double rounded_product(double a, double b) { return a * b; }
DEVICE u32 f32_to_tf32(float value) {
    const u32 bits = bits_as<u32>(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000) & 0xffffe000u;
}
DEVICE u32 pack_f16(float low, float high) { return f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }
DEVICE u32 pack_bf16(float low, float high) { return f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16; }

DEVICE float minimum(float a, float b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? a : b) : a < b ? a : b;
}
DEVICE double minimum(double a, double b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? a : b) : a < b ? a : b;
}
DEVICE float maximum(float a, float b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? b : a) : a < b ? b : a;
}
DEVICE double maximum(double a, double b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? b : a) : a < b ? b : a;
}
DEVICE int count_bits(u64 value) { return __builtin_popcountll(value); }
DEVICE float reciprocal_estimate(float x) { return 1.0f / x; }
DEVICE float exp2_estimate(float x) {
    const float result = exp2f(x);
    return result < 1.17549435e-38f ? 0.0f : result;
}

// ---- Atomic updates ----

template <int BYTES> struct EmulatorWord;
template <> struct EmulatorWord<1> { typedef u8 type; };
template <> struct EmulatorWord<2> { typedef u16 type; };
template <> struct EmulatorWord<4> { typedef u32 type; };
template <> struct EmulatorWord<8> { typedef u64 type; };
// Not instrumented in checked kernels: it says itself what it does.
template <class T, class Update>
__attribute__((no_sanitize("thread"), noinline)) static void atomic_update(T* target, Update update) {
    typedef typename EmulatorWord<sizeof(T)>::type Word;
#ifdef __SANITIZE_THREAD__
    emulator_check_atomic(target, sizeof(T), __builtin_return_address(0));
#endif
    Word* const word = (Word*)target;
    Word expected = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &expected, bits_as<Word>(update(bits_as<T>(expected))), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
