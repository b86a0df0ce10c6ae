// Attention over the paged KV cache. A block of the cache holds (block_size, g, D) numbers, g being the number of key heads. It
// is laid out for the kernels: a head's keys (values) are contiguous, in strips of 16 slots, so that vector lanes are keys in
// the first product (q.k) and columns in the second (weights.v):
//   keys    bf16 [D/2][16][2]   float32 [D][16]
//   values  bf16 [8][D][2]      float32 [16][D]
// or int8 codes in the same order, followed by the 16 float32 scales of the strip.
// A row's keys are processed in ascending order, in blocks and splits that begin at fixed positions: its result depends only
// on its own query and keys. Not here: the loops (attention.inc), which sequence owns a block (glimmer/engine).
#pragma once

#include <vector>

#include "kernels.h"

namespace glimmer {

constexpr int STRIP = 16;    // slots
constexpr int KEYS = 256;    // that are scored at a time
constexpr int SPLIT = 2048;  // keys that are summed separately: work for one thread (as in flash decoding)
constexpr int TILE = 32;     // rows, columns and depth are padded to multiples of it

[[gnu::always_inline]] inline int tiles(int n) { return (n + TILE - 1) / TILE * TILE; }

// One layer's cache.
struct Paged {
    char *keys, *values;
    bool bf16;         // queries, keys and values are bf16, else float32
    bool codes;        // the cache holds int8 codes and scales instead
    long blocks;       // number of blocks
    int block_size;    // a multiple of STRIP
    int heads, width;  // g, and D: even
    // Bytes of one head in one slot.
    [[gnu::always_inline]] size_t slot() const { return codes ? width + sizeof(float) : width * (bf16 ? 2 : sizeof(float)); }
    // Byte offset of a head's strip that begins with slot `offset` of a block, a multiple of STRIP.
    [[gnu::always_inline]] size_t strip(long block, int offset, int head) const {
        return ((size_t)(block * heads + head) * block_size + offset) * slot();
    }
};

// The keys of one sequence. `table` is its block table: position p is in slot table[p / block_size] * block_size +
// p % block_size.
struct Sequence {
    const Paged& cache;
    const int64_t* table;
    int head;
    [[gnu::always_inline]] size_t strip(long position) const {
        const int block = (int)position / cache.block_size;
        return cache.strip(table[block], (int)position - block * cache.block_size, head);
    }
};

// The state of the online softmax of m rows over some keys. After all keys, attention is sum / total.
struct State {
    float* sum;          // (tiles(m), tiles(D)) of 2^((product - running_max) * scale) * value
    float* total;        // (m) of 2^((product - running_max) * scale)
    float* running_max;  // (m) the product that others are relative to: at most LEEWAY / scale below the largest
    [[gnu::always_inline]] static size_t size(int m, int width) { return (size_t)tiles(m) * (tiles(width) + 2); }  // floats
    static State at(float* memory, int m, int width) {
        float* total = memory + (size_t)tiles(m) * tiles(width);
        return {memory, total, total + tiles(m)};
    }
};

struct AttentionLoops {
    // Rows of q (m, tiles(D)), bf16 or float32, padded with zeros, over keys first..last; row i sees the keys below
    // seen[i] (the causal mask), ascending. scale: of the products, as exponents of two. work: a workspace of work(m, D) bytes.
    void (*attend)(const Sequence& keys, const void* q, int m, const long* seen, long first, long last, float scale,
                   State state, char* work);
    size_t (*work)(int m, int width);
    // Adds `later`, the state of later keys of the same rows, to `state`.
    void (*merge)(State state, State later, int m, int width, float scale);
    // y (D) = row i of sum / total.
    void (*finish)(State state, int i, int width, Values y);
};

// Writes k, v (rows, g, D), rows a stride apart, into their slots. If the cache holds codes, each row and head of k and of v
// is quantised with its own scale by Kernels::to_int8. Throws std::invalid_argument for a slot that does not exist.
void store_kv(Values k, long k_stride, Values v, long v_stride, const int64_t* slot_mapping, long rows, const Paged& cache);

// The keys or the values of one layer, as blocks of `bytes` bytes.
struct Blocks {
    char* begin;
    size_t bytes;
    long count;
};
// Copies some blocks of all parts of a cache to data, or from it: block after block, the parts of each in their order.
// Throws std::out_of_range for a block that does not exist.
void export_blocks(const std::vector<Blocks>& parts, const std::vector<long>& blocks, char* data);
void import_blocks(const std::vector<Blocks>& parts, const std::vector<long>& blocks, const char* data);

// y (rows, heads * D) of q (rows, heads, D), rows a stride apart. The rows of sequence s are query_start_loc[s] to
// query_start_loc[s + 1] (sequences + 1 numbers), the last ones of its seq_lens[s] positions; its blocks are row s of
// block_tables (sequences, columns). Head i reads key head i / (heads / g). Throws std::invalid_argument if these do not fit together.
void attention(Values q, long stride, int heads, const Paged& cache, const int64_t* block_tables, long columns,
               const int64_t* query_start_loc, const int64_t* seq_lens, long sequences, float scale, Values y);

}  // namespace glimmer
