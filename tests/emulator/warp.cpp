// Collectives of a warp: each lane leaves its operands with the warp, the last that comes computes for all, and each
// takes its result when it goes on.
//
// Layouts of registers are those of the PTX ISA; backends/cuda/prelude.cuh states them in words.

#include <cstring>

#include "fibers.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace emulator {

const char* name_of(EmulatorCollective kind) {
    static const char* const names[] = {
        "warp_barrier", "shuffle_xor", "shuffle_down", "shuffle_up", "shuffle", "ballot", "load_matrix",
        "load_matrix_transposed", "mma_m16n8k16_f16", "mma_m16n8k16_bf16", "mma_m16n8k8_tf32", "mma_m16n8k32_s8s8",
        "mma_m16n8k32_s8u8", "mma_m16n8k32_u8s8", "mma_m16n8k32_u8u8",
    };
    return names[kind];
}

// ---- Matrix multiplication: c[16, 8] += a[16, K] * b[K, 8] ----

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

// Row `m` of the product is a sum of rows of b.
template <class Vector, class Scalar, int K>
static void multiply(uint32_t (&c)[16][8], const Scalar (&a)[16][K], const Vector (&b)[K]) {
    for (int m = 0; m < 16; ++m) {
        Vector even, odd = Vector{};  // two sums: half as long a chain of additions
        memcpy(&even, c[m], sizeof even);
        for (int k = 0; k < K; k += 2) {
            even += a[m][k] * b[k];
            odd += a[m][k + 1] * b[k + 1];
        }
        even += odd;
        memcpy(c[m], &even, sizeof even);
    }
}

static Floats as_floats(Words bits) { return Floats(bits); }

// Each word's f16 in its lower half.
static Floats floats_of_halves(Words words) {
#ifdef __F16C__
    typedef uint16_t Halves __attribute__((vector_size(16)));
    return Floats(_mm256_cvtph_ps(__m128i(__builtin_convertvector(words, Halves))));
#else
    const Words magnitude = words & 0x7fff;
    // Exponents of f16 are 112 less biased; the product also makes subnormal numbers normal.
    const Words scaled = Words(Floats(magnitude << 13) * 0x1p112f);
    const Words special = Words(magnitude >= 0x7c00) & 0x7f800000u;
    return Floats(scaled | special | (words & 0x8000) << 16);
#endif
}

// 16-bit floats: a word has those of k in its lower, of k + 1 in its upper half.
template <class Low, class High> static void multiply_halves(Fragments& fragments, Low low, High high) {
    float a[16][16];
    Floats b[16];
    for (int m = 0; m < 16; ++m) {
        Words words;
        memcpy(&words, fragments.a[m], sizeof words);
        const Floats even = low(words), odd = high(words);
        for (int i = 0; i < 8; ++i) {
            a[m][2 * i] = even[i];
            a[m][2 * i + 1] = odd[i];
        }
    }
    for (int i = 0; i < 8; ++i) {
        Words words;
        memcpy(&words, fragments.b[i], sizeof words);
        b[2 * i] = low(words);
        b[2 * i + 1] = high(words);
    }
    multiply(fragments.c, a, b);
}

// The lower 13 bits of each register do not count.
static void multiply_tf32(Fragments& fragments) {
    float a[16][8];
    Floats b[8];
    for (auto& row : fragments.a)
        for (uint32_t& word : row) word &= 0xffffe000u;
    for (auto& row : fragments.b)
        for (uint32_t& word : row) word &= 0xffffe000u;
    memcpy(a, fragments.a, sizeof a);
    memcpy(b, fragments.b, sizeof b);
    multiply(fragments.c, a, b);
}

static void multiply_bytes(Fragments& fragments, bool a_is_signed, bool b_is_signed) {
    int32_t a[16][32];
    Integers b[32];
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(fragments.a);
    for (int i = 0; i < 16 * 32; ++i) (&a[0][0])[i] = a_is_signed ? int8_t(bytes[i]) : bytes[i];
    for (int k = 0; k < 32; ++k) {
        Integers words;
        memcpy(&words, fragments.b[k / 4], sizeof words);
        words <<= 24 - k % 4 * 8;
        b[k] = b_is_signed ? words >> 24 : words >> 24 & 0xff;
    }
    multiply(fragments.c, a, b);
}

static void copy_matrices(Warp& warp) {
    for (int row = 0; row < 8 * warp.width; ++row) memcpy(warp.row_elements[row], warp.rows[row], 16);
}

void complete(Warp& warp) {
    Fragments& fragments = warp.fragments;
    switch (warp.kind) {
        case EMULATOR_WARP_BARRIER: ++warp.barriers; break;
        case EMULATOR_LOAD_MATRIX:
        case EMULATOR_LOAD_MATRIX_TRANSPOSED: copy_matrices(warp); break;
        case EMULATOR_MULTIPLY_F16:
            multiply_halves(fragments, floats_of_halves, [](Words words) { return floats_of_halves(words >> 16); });
            break;
        case EMULATOR_MULTIPLY_BF16:
            multiply_halves(fragments, [](Words words) { return as_floats(words << 16); },
                            [](Words words) { return as_floats(words & 0xffff0000u); });
            break;
        case EMULATOR_MULTIPLY_TF32: multiply_tf32(fragments); break;
        case EMULATOR_MULTIPLY_S8S8: multiply_bytes(fragments, true, true); break;
        case EMULATOR_MULTIPLY_S8U8: multiply_bytes(fragments, true, false); break;
        case EMULATOR_MULTIPLY_U8S8: multiply_bytes(fragments, false, true); break;
        case EMULATOR_MULTIPLY_U8U8: multiply_bytes(fragments, false, false); break;
        default: break;  // lanes read what the others brought
    }
}

[[noreturn]] static void fail_in_shared(Worker& here, const void* address, int bytes, const char* what, int line) {
    const long offset = static_cast<const unsigned char*>(address) - here.shared;
    const bool inside = offset >= 0 && offset + bytes <= long(here.shared_bytes);
    here.fail(text("%s%s of %d bytes at shared memory %+ld (of %zu bytes), line %d", inside ? "misaligned " : "", what, bytes,
                   offset, here.shared_bytes, line));
}

// Whether so many bytes at an address are the block's shared memory, and aligned to their number.
static bool is_in_shared(const Worker& here, const void* address, size_t bytes) {
    const size_t offset = static_cast<const unsigned char*>(address) - here.shared;
    return offset < here.shared_bytes && offset + bytes <= here.shared_bytes && offset % bytes == 0;
}

}  // namespace emulator

using namespace emulator;

void emulator_warp_barrier(int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    me.segment = 0;
    arrive(here, &me, EMULATOR_WARP_BARRIER, 0, line);
}

void emulator_shuffle(EmulatorCollective kind, const void* value, void* result, int bytes, int argument, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    Exchange& exchange = me.warp->exchanges[me.warp->generation % 2];
    const unsigned number = argument;
    unsigned source = number % WARP;
    if (kind == EMULATOR_SHUFFLE_XOR) source = (me.lane ^ number) % WARP;
    if (kind == EMULATOR_SHUFFLE_DOWN) source = me.lane + number < WARP ? me.lane + number : me.lane;
    if (kind == EMULATOR_SHUFFLE_UP) source = number <= me.lane ? me.lane - number : me.lane;
    uint64_t* own = &exchange.values[me.lane];
    bytes == 4 ? memcpy(own, value, 4) : memcpy(own, value, 8);
    arrive(here, &me, kind, bytes, line);
    const uint64_t* other = &exchange.values[source];
    bytes == 4 ? memcpy(result, other, 4) : memcpy(result, other, 8);
}

unsigned emulator_ballot(bool holds, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    Exchange& exchange = me.warp->exchanges[me.warp->generation % 2];
    if (me.warp->arrived == 0) exchange.votes = 0;
    exchange.votes |= uint32_t(holds) << me.lane;
    arrive(here, &me, EMULATOR_BALLOT, 0, line);
    return exchange.votes;
}

void emulator_load_matrix(EmulatorCollective kind, unsigned* registers, const void* row, int matrices, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    if (me.lane < 8u * matrices) {
        if (!is_in_shared(here, row, 16)) fail_in_shared(here, row, 16, name_of(kind), line);
        if (here.checker) check(here, row, 16, Access::READ, {line, nullptr});
    }
    me.warp->rows[me.lane] = row;
    arrive(here, &me, kind, matrices, line);
    const unsigned major = me.lane / 4, minor = me.lane % 4 * 2;
    for (int i = 0; i < matrices; ++i) {
        const auto& matrix = *reinterpret_cast<const uint16_t(*)[8][8]>(me.warp->row_elements[8 * i]);
        const bool transposed = kind == EMULATOR_LOAD_MATRIX_TRANSPOSED;
        const uint32_t low = transposed ? matrix[minor][major] : matrix[major][minor];
        const uint32_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        registers[i] = low | high << 16;
    }
}

void emulator_multiply(EmulatorCollective kind, void* c, const unsigned* a, const unsigned* b, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    Fragments& fragments = me.warp->fragments;
    const unsigned group = me.lane / 4, within = me.lane % 4;
    fragments.a[group][within] = a[0];
    fragments.a[group + 8][within] = a[1];
    fragments.a[group][within + 4] = a[2];
    fragments.a[group + 8][within + 4] = a[3];
    fragments.b[within][group] = b[0];
    fragments.b[within + 4][group] = b[1];
    uint32_t *upper = &fragments.c[group][2 * within], *lower = &fragments.c[group + 8][2 * within];
    memcpy(upper, c, 8);
    memcpy(lower, static_cast<uint32_t*>(c) + 2, 8);
    arrive(here, &me, kind, 0, line);
    memcpy(c, upper, 8);
    memcpy(static_cast<uint32_t*>(c) + 2, lower, 8);
}

// ---- Asynchronous copies: performed as late as is legal, at the wait ----

void emulator_copy_async(void* shared, const void* global, int bytes, bool valid, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    if (!is_in_shared(here, shared, bytes)) fail_in_shared(here, shared, bytes, "asynchronous copy", line);
    if (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)
        here.fail(text("misaligned source of an asynchronous copy of %d bytes: ", bytes) +
                  name_of_place(here, reinterpret_cast<uintptr_t>(global)) + Origin{line, nullptr}.describe());
    if (here.checker) {
        if (valid) check(here, global, bytes, Access::READ, {line, nullptr});
        check(here, shared, bytes, Access::COPY_START, {line, nullptr});
    }
    me.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid,
                         me.group, line});
}

void emulator_copy_async_commit() { ++running(*worker()).group; }

static void perform(const Copy& copy) {
    static const unsigned char zeros[16] = {};
    const unsigned char* source = copy.valid ? copy.source : zeros;
    if (copy.bytes == 16) memcpy(copy.target, source, 16);
    else if (copy.bytes == 8) memcpy(copy.target, source, 8);
    else memcpy(copy.target, source, 4);
}

void emulator_copy_async_wait(int pending) {
    Worker& here = *worker();
    Fiber& me = running(here);
    for (; me.performed < me.copies.size() && me.copies[me.performed].group + pending < me.group; ++me.performed) {
        const Copy& copy = me.copies[me.performed];
        if (here.checker) {
            if (copy.valid) check(here, copy.source, copy.bytes, Access::READ, {copy.line, nullptr});
            check(here, copy.target, copy.bytes, Access::COPY_END, {copy.line, nullptr});
        }
        here.copy_line = copy.line;
        perform(copy);
    }
    here.copy_line = 0;
    if (me.performed > 64 || me.performed == me.copies.size()) {
        me.copies.erase(me.copies.begin(), me.copies.begin() + me.performed);
        me.performed = 0;
    }
}
