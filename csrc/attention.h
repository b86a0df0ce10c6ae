// Attention over the paged cache. Each block of the cache, (block_size, g, D) in size, is laid out for the kernels: a head's
// keys (values) lie together, in strips of 16 slots, so that vector lanes are keys in the first product, columns in the second:
//   keys    bf16 [D/2][16][2]   float32 [D][16]
//   values  bf16 [8][D][2]      float32 [16][D]
// or as codes in int8, in the order that the numbers would have, and behind a strip's codes its 16 scales in float32.
// A row's keys are taken in ascending order, in blocks and splits that begin at fixed positions: its result depends on nothing
// but its own query and keys. Not here: the loops (attention.inc), which block is whose (glimmer/engine).
#pragma once

#include <vector>

#include "kernels.h"

namespace glimmer {

constexpr int STRIP = 16;    // slots
constexpr int KEYS = 256;    // whose scores exist at once
constexpr int SPLIT = 2048;  // keys that are summed up apart: work for one thread
constexpr int TILE = 32;     // rows, columns and depth are padded to multiples of it

[[gnu::always_inline]] inline int tiles(int n) { return (n + TILE - 1) / TILE * TILE; }

// One layer's cache.
struct Paged {
    char *keys, *values;
    bool bf16;         // what queries, keys and values are: else float32
    bool codes;        // the cache holds int8 instead
    long blocks;       // that there are
    int block_size;    // a multiple of STRIP
    int heads, width;  // g, and D: even
    // Bytes of a head's part of a slot.
    [[gnu::always_inline]] size_t slot() const { return codes ? width + sizeof(float) : width * (bf16 ? 2 : sizeof(float)); }
    // The byte where a head's strip begins with slot `offset` of a block, a multiple of STRIP.
    [[gnu::always_inline]] size_t strip(long block, int offset, int head) const {
        return ((size_t)(block * heads + head) * block_size + offset) * slot();
    }
};

// The keys of one sequence: those of position p in slot table[p / block_size] * block_size + p % block_size.
struct Sequence {
    const Paged& cache;
    const int64_t* table;
    int head;
    [[gnu::always_inline]] size_t strip(long position) const {
        const int block = (int)position / cache.block_size;
        return cache.strip(table[block], (int)position - block * cache.block_size, head);
    }
};

// What some keys make of m rows: attention is sum / total once all keys are in.
struct State {
    float* sum;    // (tiles(m), tiles(D)) of 2^(score - most) * value
    float* total;  // (m) of 2^(score - most)
    float* most;   // (m) a power of two, hardly below the largest score
    [[gnu::always_inline]] static size_t size(int m, int width) { return (size_t)tiles(m) * (tiles(width) + 2); }  // floats
    static State at(float* memory, int m, int width) {
        float* total = memory + (size_t)tiles(m) * tiles(width);
        return {memory, total, total + tiles(m)};
    }
};

struct AttentionLoops {
    // Rows of q (m, tiles(D)), bf16 or float32, padded with zeros, over keys first..last; row i sees the keys below
    // seen[i], ascending. work: work(m, D) bytes of anything.
    void (*attend)(const Sequence& keys, const void* q, int m, const long* seen, long first, long last, float scale,
                   State state, char* work);
    size_t (*work)(int m, int width);
    // The keys of `state` and later ones.
    void (*merge)(State state, State later, int m, int width);
    // y (D) = row i
    void (*finish)(State state, int i, int width, Values y);
};

// k, v (rows, g, D), rows a stride apart, into their slots; codes: each row and head of k and of v with its own scale, as
// Kernels::to_int8 makes them. Throws std::invalid_argument for a slot that does not exist.
void store_kv(Values k, long k_stride, Values v, long v_stride, const int64_t* slots, long rows, const Paged& cache);

// y (rows, heads * D) of q (rows, heads, D), rows a stride apart. The rows of sequence s are starts[s]..starts[s+1], the last
// of lengths[s] positions; its blocks are row s of `table` (sequences, columns). Head i reads key head i / (heads / g).
// Throws std::invalid_argument if these do not fit together.
void attention(Values q, long stride, int heads, const Paged& cache, const int64_t* table, long columns,
               const std::vector<long>& starts, const std::vector<long>& lengths, float scale, Values y);

}  // namespace glimmer
