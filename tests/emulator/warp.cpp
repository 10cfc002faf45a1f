// Collectives of a warp: the last lane that comes performs them for all, on the operands that each left in its fiber.
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
        "load_matrix_transposed", "mma_m16n8k16_f16", "mma_m16n8k16_bf16", "mma_m16n8k8_tf32", "mma_m16n8k32_s8",
        "mma_m16n8k32_u8s8",
    };
    return names[kind];
}

// ---- Shuffles, votes, ldmatrix ----

static void exchange(Warp& warp) {
    unsigned char values[WARP][8];
    for (unsigned lane = 0; lane < WARP; ++lane) memcpy(values[lane], warp.lanes[lane]->input, warp.bytes);
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Fiber& fiber = *warp.lanes[lane];
        unsigned source = fiber.number;
        if (warp.kind == EMULATOR_SHUFFLE_XOR) source = lane ^ source;
        if (warp.kind == EMULATOR_SHUFFLE_DOWN) source = lane + source < WARP ? lane + source : lane;
        if (warp.kind == EMULATOR_SHUFFLE_UP) source = source <= lane ? lane - source : lane;
        memcpy(fiber.output, values[source % WARP], warp.bytes);
    }
}

static void vote(Warp& warp) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) votes |= unsigned(warp.lanes[lane]->number != 0) << lane;
    for (Fiber* fiber : warp.lanes) memcpy(fiber->output, &votes, sizeof votes);
}

static void load_matrices(Warp& warp) {
    const unsigned matrices = warp.bytes;
    for (unsigned matrix = 0; matrix < matrices; ++matrix) {
        uint16_t elements[8][8];
        for (unsigned row = 0; row < 8; ++row) memcpy(elements[row], warp.lanes[8 * matrix + row]->input, 16);
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const unsigned major = lane / 4, minor = lane % 4 * 2;
            const bool transposed = warp.kind == EMULATOR_LOAD_MATRIX_TRANSPOSED;
            const uint16_t low = transposed ? elements[minor][major] : elements[major][minor];
            const uint16_t high = transposed ? elements[minor + 1][major] : elements[major][minor + 1];
            static_cast<uint32_t*>(warp.lanes[lane]->output)[matrix] = low | uint32_t(high) << 16;
        }
    }
}

// ---- Matrix multiplication: c[16, 8] += a[16, K] * b[K, 8] ----

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));

// The 32-bit registers of a warp as matrices: rows of a, and columns of b, each of 8 registers along K.
struct Operands {
    alignas(64) uint32_t a[16][8];
    alignas(64) uint32_t b[8][8];
};

static void gather(const Warp& warp, Operands& operands) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned group = lane / 4, within = lane % 4;
        const uint32_t* a = static_cast<const uint32_t*>(warp.lanes[lane]->input);
        const uint32_t* b = static_cast<const uint32_t*>(warp.lanes[lane]->second);
        operands.a[group][within] = a[0];
        operands.a[group + 8][within] = a[1];
        operands.a[group][within + 4] = a[2];
        operands.a[group + 8][within + 4] = a[3];
        operands.b[group][within] = b[0];
        operands.b[group][within + 4] = b[1];
    }
}

// b[column, K] as [K, column].
template <int K> static void transpose(const uint32_t (&columns)[8][K], uint32_t (&rows)[K][8]) {
    for (int k = 0; k < K; ++k)
        for (int column = 0; column < 8; ++column) rows[k][column] = columns[column][k];
}

// Rows of the accumulator from the lanes, or back to them.
template <class Vector> static void move_sums(const Warp& warp, Vector (&sums)[16], bool store) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned row = lane / 4, column = lane % 4 * 2;
        unsigned char* c = static_cast<unsigned char*>(warp.lanes[lane]->output);
        unsigned char* upper = reinterpret_cast<unsigned char*>(&sums[row]) + 4 * column;
        unsigned char* lower = reinterpret_cast<unsigned char*>(&sums[row + 8]) + 4 * column;
        memcpy(store ? c : upper, store ? upper : c, 8);
        memcpy(store ? c + 8 : lower, store ? lower : c + 8, 8);
    }
}

template <int K> static void multiply_floats(const Warp& warp, const float (&a)[16][K], const uint32_t (&b)[8][K]) {
    alignas(64) uint32_t rows[K][8];
    Floats sums[16], row[K];
    transpose(b, rows);
    memcpy(row, rows, sizeof rows);
    move_sums(warp, sums, false);
    for (int m = 0; m < 16; ++m) {
        Floats even = sums[m], odd = Floats{};  // two sums: half as long a chain of additions
        for (int k = 0; k < K; k += 2) {
            even += a[m][k] * row[k];
            odd += a[m][k + 1] * row[k + 1];
        }
        sums[m] = even + odd;
    }
    move_sums(warp, sums, true);
}

// The operands of 16 bits as floats.
static void widen(const uint32_t* words, float* result, int count, bool is_bf16) {
    for (int i = 0; i < count; ++i) {
        const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000u;
        if (is_bf16) {
            memcpy(&result[2 * i], &low, 4);
            memcpy(&result[2 * i + 1], &high, 4);
        }
    }
    if (is_bf16) return;
#ifdef __F16C__
    for (int i = 0; i < count; i += 4)
        _mm256_storeu_ps(result + 2 * i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i))));
#else
    for (int i = 0; i < 2 * count; ++i) {
        const uint32_t half = words[i / 2] >> (i % 2 * 16) & 0xffff, magnitude = half & 0x7fff;
        uint32_t bits = magnitude << 13;
        float scaled;
        memcpy(&scaled, &bits, 4);
        scaled *= 0x1p112f;
        memcpy(&bits, &scaled, 4);
        if (magnitude >= 0x7c00) bits = 0x7f800000u | magnitude << 13;
        bits |= (half & 0x8000) << 16;
        memcpy(&result[i], &bits, 4);
    }
#endif
}

static void multiply_halves(const Warp& warp, bool is_bf16) {
    Operands operands;
    alignas(64) float a[16][16], b[8][16];
    gather(warp, operands);
    widen(&operands.a[0][0], &a[0][0], 16 * 8, is_bf16);
    widen(&operands.b[0][0], &b[0][0], 8 * 8, is_bf16);
    uint32_t bits[8][16];
    memcpy(bits, b, sizeof b);
    multiply_floats<16>(warp, a, bits);
}

// tf32: the lower 13 bits of each register do not count.
static void multiply_tf32(const Warp& warp) {
    Operands operands;
    alignas(64) float a[16][8];
    gather(warp, operands);
    for (auto& row : operands.a)
        for (uint32_t& word : row) word &= 0xffffe000u;
    for (auto& column : operands.b)
        for (uint32_t& word : column) word &= 0xffffe000u;
    memcpy(a, operands.a, sizeof a);
    multiply_floats<8>(warp, a, operands.b);
}

// 8-bit integers, widened to pairs of 16 bits: one word holds two neighbours along K.
static void multiply_bytes(const Warp& warp, bool a_is_signed) {
    Operands operands;
    gather(warp, operands);
    alignas(64) int16_t a[16][32], b[8][32];
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(operands.a);
    for (int i = 0; i < 16 * 32; ++i) (&a[0][0])[i] = a_is_signed ? int16_t(int8_t(bytes[i])) : int16_t(bytes[i]);
    bytes = reinterpret_cast<const uint8_t*>(operands.b);
    for (int i = 0; i < 8 * 32; ++i) (&b[0][0])[i] = int8_t(bytes[i]);
    uint32_t columns[8][16];
    alignas(64) uint32_t rows[16][8];
    memcpy(columns, b, sizeof b);
    transpose(columns, rows);
    Integers sums[16];
    move_sums(warp, sums, false);
    for (int m = 0; m < 16; ++m)
        for (int pair = 0; pair < 16; ++pair) {
#ifdef __AVX2__
            uint32_t both;
            memcpy(&both, &a[m][2 * pair], 4);
            const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows[pair]));
            sums[m] += Integers(_mm256_madd_epi16(_mm256_set1_epi32(both), right));
#else
            for (int n = 0; n < 8; ++n)
                sums[m][n] += a[m][2 * pair] * b[n][2 * pair] + a[m][2 * pair + 1] * b[n][2 * pair + 1];
#endif
        }
    move_sums(warp, sums, true);
}

void complete(Warp& warp) {
    switch (warp.kind) {
        case EMULATOR_WARP_BARRIER: ++warp.barriers; break;
        case EMULATOR_SHUFFLE_XOR:
        case EMULATOR_SHUFFLE_DOWN:
        case EMULATOR_SHUFFLE_UP:
        case EMULATOR_SHUFFLE: exchange(warp); break;
        case EMULATOR_BALLOT: vote(warp); break;
        case EMULATOR_LOAD_MATRIX:
        case EMULATOR_LOAD_MATRIX_TRANSPOSED: load_matrices(warp); break;
        case EMULATOR_MULTIPLY_F16: multiply_halves(warp, false); break;
        case EMULATOR_MULTIPLY_BF16: multiply_halves(warp, true); break;
        case EMULATOR_MULTIPLY_TF32: multiply_tf32(warp); break;
        case EMULATOR_MULTIPLY_S8: multiply_bytes(warp, true); break;
        case EMULATOR_MULTIPLY_U8S8: multiply_bytes(warp, false); break;
    }
}

static Fiber& running(Worker& here) {
    if (here.current == nullptr) here.fail("a collective in a kernel that was taken for one without any");
    return *here.current;
}

// Fails where `bytes` at an address are not aligned to that many, or not in the block's shared memory.
static void require_shared(Worker& here, const void* address, int bytes, const char* what, int line) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(here.shared);
    if (at < begin || at + bytes > begin + here.shared_bytes)
        here.fail(text("%s of %d bytes at shared memory %+ld (of %zu bytes), line %d", what, bytes, long(at - begin),
                       here.shared_bytes, line));
    if (at % bytes != 0)
        here.fail(text("misaligned %s of %d bytes at shared memory %+ld, line %d", what, bytes, long(at - begin), line));
}

}  // namespace emulator

using namespace emulator;

void emulator_warp_barrier(int line) {
    Fiber& me = running(*worker());
    me.segment = 0;
    arrive(*worker(), EMULATOR_WARP_BARRIER, 0, line);
}

void emulator_shuffle(EmulatorCollective kind, const void* value, void* result, int bytes, int argument, int line) {
    Fiber& me = running(*worker());
    me.input = value;
    me.output = result;
    me.number = argument;
    arrive(*worker(), kind, bytes, line);
}

unsigned emulator_ballot(bool holds, int line) {
    Fiber& me = running(*worker());
    unsigned result;
    me.output = &result;
    me.number = holds;
    arrive(*worker(), EMULATOR_BALLOT, 0, line);
    return result;
}

void emulator_load_matrix(EmulatorCollective kind, unsigned* registers, const void* row, int matrices, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    if (me.lane < 8u * matrices) {
        require_shared(here, row, 16, name_of(kind), line);
        if (here.checker) check(here, row, 16, Access::READ, {line, nullptr});
    }
    me.input = row;
    me.output = registers;
    arrive(here, kind, matrices, line);
}

void emulator_multiply(EmulatorCollective kind, void* c, const unsigned* a, const unsigned* b, int line) {
    Fiber& me = running(*worker());
    me.input = a;
    me.second = b;
    me.output = c;
    arrive(*worker(), kind, 0, line);
}

// ---- Asynchronous copies: performed as late as is legal, at the wait ----

void emulator_copy_async(void* shared, const void* global, int bytes, bool valid, int line) {
    Worker& here = *worker();
    Fiber& me = running(here);
    require_shared(here, shared, bytes, "asynchronous copy", line);
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

void emulator_copy_async_wait(int pending) {
    Worker& here = *worker();
    Fiber& me = running(here);
    size_t done = 0;
    for (; done < me.copies.size() && me.copies[done].group + pending < me.group; ++done) {
        const Copy& copy = me.copies[done];
        if (here.checker) {
            if (copy.valid) check(here, copy.source, copy.bytes, Access::READ, {copy.line, nullptr});
            check(here, copy.target, copy.bytes, Access::COPY_END, {copy.line, nullptr});
        }
        here.copy_line = copy.line;
        if (copy.valid) memcpy(copy.target, copy.source, copy.bytes);
        else memset(copy.target, 0, copy.bytes);
    }
    here.copy_line = 0;
    me.copies.erase(me.copies.begin(), me.copies.begin() + done);
}
