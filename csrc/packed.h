// Packed: weight matrices in the panels of kernels.h. Rows: activations in the form that the loops of a kind take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace glimmer {

// `count` matrices of the same shape (n, k), each made of `parts` equal parts one below the other (gate, up) whose panels
// alternate, so that the panels for the same columns of gate and up are adjacent. The panels of a matrix are adjacent, and so
// are the scales of its columns; matrices may lie anywhere. Either it owns its memory, zeros until filled, or its matrices are
// placed in memory that somebody else has filled (a mapped file).
struct Packed {
    const Kind kind;
    const long count;
    const int n, k, parts;
    const Groups groups;  // int4 only

    // Throws std::invalid_argument for impossible sizes, std::bad_alloc.
    // owns: whether memory is allocated; else every matrix must be placed before it is used.
    Packed(Kind kind, long count, int n, int k, int parts, int group_size, bool wide_scales, bool owns = true);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    // Packs rows first..first+rows of matrix e. codes: the rows in the storage of their kind, `stride` bytes apart; int4 codes
    // are two per byte, the even column in the low bits. scales: float32, one per row (fp8, int8) or k / group_size per row
    // (int4). zero_points: int4 only, a byte for each scale; null: all 8. Without wide_scales, scales of int4 must be bf16
    // numbers; a NaN or infinite scale makes its row NaN, and a scale below 2^-31 of the row's largest power of two becomes 0.
    void fill(long e, int first, int rows, const void* codes, size_t stride, const float* scales, const uint8_t* zero_points);

    int depth() const { return padded(kind, k, groups.size); }  // k with padding
    int panels() const { return (n / parts + PANEL - 1) / PANEL * parts; }
    size_t panel_bytes() const;
    size_t bytes() const { return taken; }
    size_t matrix_bytes() const { return panels() * panel_bytes(); }                           // the panels of one matrix
    size_t scales_bytes() const { return is_plain(kind) ? 0 : (size_t)panels() * PANEL * 4; }  // the scales of one matrix
    const uint8_t* panel(long e, int p) const { return places[e].panels + p * panel_bytes(); }
    const float* panel_scales(long e, int p) const { return places[e].scales ? places[e].scales + p * PANEL : nullptr; }
    // From now on matrix e is what lies at these addresses: matrix_bytes() and scales_bytes() of it, in this layout, in memory
    // that `keeper` keeps.
    void place(long e, const void* panels, const void* scales, std::shared_ptr<void> keeper = nullptr);

private:
    struct Place {
        const uint8_t* panels = nullptr;
        const float* scales = nullptr;
    };
    std::vector<Place> places;
    std::shared_ptr<struct Arena> arena;  // null if the memory is somebody else's
    std::shared_ptr<void> keeper;
    size_t taken = 0;
};

// m rows of activations in the form of a kind: values (m + BEYOND, depth) and, for fp8 and int8, a scale and a sum per row;
// the scales and sums of int4 are stored among the values.
struct Rows {
    char* values;
    float* scales;
    float* sums;
    size_t stride;  // bytes

    // Uses `memory` of bytes(w, m), 64-byte aligned.
    Rows(const Packed& w, long m, void* memory);
    static size_t bytes(const Packed& w, long m);
    // Sets row i from k numbers.
    void set(const Packed& w, long i, const float* x);
    void set(const Packed& w, long i, const uint16_t* x);  // bf16
    void copy(long i, const Rows& from, long j);
    // c (m, 32) = rows first..first+m times panel p of matrix e, scales of columns not yet applied; c and next as in kernels.h.
    void times(const Packed& w, long e, int p, long first, int m, float* c, const void* next) const;
    // Scales of row i and the following rows, which the sums must be multiplied by, besides their columns' scales; null: none.
    const float* row_scales(const Packed& w, long i) const {
        return w.kind == Kind::fp8 || w.kind == Kind::int8 ? scales + i : nullptr;
    }
};

}  // namespace glimmer
