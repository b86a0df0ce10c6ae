// Packed: matrices in the panels of kernels.h, and Rows: activations in the form that a kind's loops take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels.h"

namespace glimmer {

// `count` matrices of the same shape (n, k), each made of `parts` equal pieces one under the other (gate, up) whose panels
// alternate, so that a panel of each lies beside its partner. Owns its memory; zeros until filled.
struct Packed {
    const Kind kind;
    const long count;
    const int n, k, parts;
    const Groups groups;  // int4 only

    // Throws std::invalid_argument for impossible sizes, std::bad_alloc.
    Packed(Kind kind, long count, int n, int k, int parts, int group, bool wide);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    // Rows first..first+rows of matrix e from memory: codes (rows, stride bytes apart) in the kind's own storage; int4 two a
    // byte, the even column low. scales: float32, one a row (fp8, int8) or k / group a row (int4); zeros: bytes alike, int4
    // only, null: 8. Scales of int4 that are not wide must be bf16 numbers; what is no number makes its row NaN, and below
    // 2^-31 of the row's largest power of two a group is zero.
    void fill(long e, int first, int rows, const void* codes, size_t stride, const float* scales, const uint8_t* zeros);

    int depth() const { return padded(kind, k, groups.size); }  // k as it lies in memory
    int panels() const { return (n / parts + PANEL - 1) / PANEL * parts; }
    size_t panel_bytes() const;
    size_t bytes() const { return taken; }
    const uint8_t* panel(long e, int p) const { return data + (e * panels() + p) * panel_bytes(); }
    const float* panel_scales(long e, int p) const { return scales ? scales + (e * panels() + p) * PANEL : nullptr; }

private:
    std::shared_ptr<struct Chunk> chunk;
    uint8_t* data = nullptr;
    float* scales = nullptr;
    size_t taken = 0;
};

// m rows as a kind wants them: values (m + BEYOND, depth) and, for fp8 and int8, a scale and a sum each; those of int4
// lie among the values.
struct Rows {
    char* values;
    float* scales;
    float* sums;
    size_t stride;  // bytes

    // In `memory` of bytes(w, m), 64-byte aligned.
    Rows(const Packed& w, long m, void* memory);
    static size_t bytes(const Packed& w, long m);
    // Row i from k numbers.
    void set(const Packed& w, long i, const float* x);
    void set(const Packed& w, long i, const uint16_t* x);  // bf16
    void copy(long i, const Rows& from, long j);
    // c (m, 32) = rows first..first+m times panel p of matrix e, scales of columns not yet applied; c and next as in kernels.h.
    void times(const Packed& w, long e, int p, long first, int m, float* c, const void* next) const;
    // What the sums of row i and its followers must be multiplied by, besides their columns' scales; null: nothing.
    const float* row_scales(const Packed& w, long i) const {
        return w.kind == Kind::fp8 || w.kind == Kind::int8 ? scales + i : nullptr;
    }
};

}  // namespace glimmer
