// The kernels: a table of innermost loops for each instruction set. The table in use is chosen once, at run time.
//
// A panel is 32 columns of a packed matrix (32 rows of the weight as stored), its inner dimension k in order, so that
// vector lanes are outputs and every output is one sum in ascending k, whatever the number of rows m beside it:
//   f32   [k][32] float                  bf16  [k/2][32][2], f32_bf16 alike  fp8   [k/2][32][2] one byte each
//   int8  [k/4][32][4], code + 128       int4  for each group: [group/8][32][4], the low nibbles four k, the high
//                                              nibbles the next four; then 32 words of scale and zero point (Groups)
// k is padded with zeros (see padded). Products are exact or in float32, sums float32 (int32 within a group of int8, int4).
// Not here: threads, and what is done with the sums (linear.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace glimmer {

constexpr int PANEL = 32;   // columns
constexpr int BEYOND = 16;  // rows of a beyond m that may be read; they do not affect any result

// Numbers in memory: bf16 or float32.
struct Values {
    void* data;
    bool bf16;
};

struct AttentionLoops;  // attention.h
struct SmallLoops;      // small.h

// f32_bf16: float32 numbers that are exact in bf16, stored as bf16 in half the memory.
enum class Kind : int { f32, f32_bf16, bf16, fp8, int8, int4 };

inline bool is_float32(Kind kind) { return kind == Kind::f32 || kind == Kind::f32_bf16; }
inline bool is_plain(Kind kind) { return is_float32(kind) || kind == Kind::bf16; }  // without scales

// The inner dimension with its padding in memory: to whole AMX tiles, or the smallest unit of the loops. int4: whole groups.
inline int padded(Kind kind, int k, int group = 32) {
    int step = kind == Kind::f32 ? 1 : kind == Kind::int8 ? 64 : kind == Kind::int4 ? group : 32;
    return (k + step - 1) / step * step;
}

// The memory layout of a quantisation group of an int4 panel. A column's scale and zero point share a word; the zero point is
// its low four bits. Above them are 5 bits of exponent and 7 of mantissa: the scale divided by its column's largest power of
// two, exact if the scale is a bf16 number and the quotient is above 2^-31. With wide_scales: the upper 28 bits of a float32.
struct Groups {
    int size;          // elements of k in a group, a multiple of 32
    bool wide_scales;  // words of scale and zero point have 32 bits, else 16
    size_t codes() const { return (size_t)size / 2 * PANEL; }
    int word() const { return wide_scales ? 4 : 2; }  // bytes
    size_t bytes() const { return codes() + PANEL * word(); }
};

struct Kernels {
    const char* name;
    int rows;  // a block of rows that fills the registers
    // Called before and after a thread's part of a parallel region; null if there is nothing to do.
    void (*begin_region)();
    void (*end_region)();
    // c (m, 32) float = a (m rows, k, stride lda elements) times one panel. a is float, or bf16 for bf16 and fp8. c has space
    // for m rounded up to `rows`; rows beyond m are undefined. next: the address that this thread reads after the panel, to be
    // prefetched; null if it is not known. f32 and f32_bf16 compute the same sums.
    void (*f32)(const float* a, long lda, int m, const float* panel, int k, float* c, const void* next);
    void (*f32_bf16)(const float* a, long lda, int m, const uint16_t* panel, int k, float* c, const void* next);
    void (*bf16)(const uint16_t* a, long lda, int m, const uint16_t* panel, int k, float* c, const void* next);
    void (*fp8)(const uint16_t* a, long lda, int m, const uint8_t* panel, int k, float* c, const void* next);
    // a int8; sums (m): the sum of each row of a, exact. c: the integer product, as float.
    void (*int8)(const int8_t* a, long lda, int m, const uint8_t* panel, int k, const float* sums, float* c, const void* next);
    // A row of a: for each of k / size groups its int8 codes, then their scale and their sum, float32.
    void (*int4)(const int8_t* a, long lda, int m, const uint8_t* panel, int k, Groups groups, float* c, const void* next);
    // Convert rows of float or bf16 to the input of the loops above, padded with zeros.
    void (*load_bf16)(const uint16_t* x, int k, float* y);
    void (*to_bf16)(const float* x, int k, uint16_t* y);               // round to nearest even
    void (*to_fp8)(const float* x, int k, uint16_t* y, float* scale);  // e4m3 values, held in bf16
    // y (depth), zeros from k on; scale and sum need not be aligned
    void (*to_int8)(const float* x, int k, int depth, int8_t* y, float* scale, float* sum);
    // y = silu(gate) * up
    void (*swiglu)(const float* gate, const float* up, int n, float* y);
    // Epilogues: write the first n columns of the sums c (m, 32) to y. Each sum is first multiplied by the scales of its row
    // and its column (rows, columns; either may be null). finish: + bias (n, may be null) -> y, rows `stride` elements apart.
    // gated: silu(gate) * up -> y likewise. add: each row times weights[i] is added to row tokens[i] of y.
    void (*finish)(const float* c, int m, int n, const float* rows, const float* columns, const float* bias, void* y,
                   size_t stride, bool bf16);
    void (*gated)(const float* gate, const float* up, int m, int n, const float* rows, const float* gate_columns,
                  const float* up_columns, void* y, size_t stride, bool bf16);
    void (*add)(const float* c, int m, int n, const float* rows, const float* columns, const float* weights, const long* tokens,
                float* y, size_t stride);
    // Measure the peak arithmetic throughput, which benchmarks compare with: `rounds` rounds of dot products of registers,
    // without memory accesses. Return the number of floating-point (integer) operations: multiplications and additions.
    double (*peak_flops_bf16)(long rounds);
    double (*peak_flops_int8)(long rounds);
    // Reads `bytes` bytes (a multiple of 1024) and does as little as possible with them, to measure memory bandwidth.
    uint64_t (*read)(const char* from, size_t bytes);
    const AttentionLoops& attention;
    const SmallLoops& small;
};

// The table in use: by default the best one that this processor supports; select changes it.
const Kernels& kernels();
// The names of the tables that this build and this processor support, best last, separated by spaces.
const char* available();
// Throws std::invalid_argument if `name` is not among available(). Not while a parallel region runs.
void select(const char* name);

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
extern const Kernels amx;
#endif

}  // namespace glimmer
