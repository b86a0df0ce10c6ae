#include "attention.h"

#include <cstring>
#include <stdexcept>

#include "pool.h"

namespace glimmer {
namespace {

constexpr int MAX_ROWS = 128;            // of a task
constexpr int MIN_TASKS_PER_THREAD = 4;  // with fewer, each split becomes a task

void check(const Paged& cache) {
    if (cache.block_size < 1 || cache.block_size % STRIP || cache.heads < 1 || cache.width < 2 || cache.width % 2)
        throw std::invalid_argument("a cache that is not laid out in strips");
}

// Writes one key or value into its lane of a strip. PAIR: how many elements of the inner dimension are interleaved.
template <int PAIR, class T> void store_key(const T* k, T* strip, int lane, int width) {
    for (int d = 0; d < width; d++) strip[(d / PAIR * STRIP + lane) * PAIR + d % PAIR] = k[d];
}
template <int PAIR, class T> void store_value(const T* v, T* strip, int lane, int width) {
    for (int d = 0; d < width; d++) strip[(lane / PAIR * width + d) * PAIR + lane % PAIR] = v[d];
}

// Quantises x (width) to int8 codes; returns their scale. x_f32: space for x in float32.
float encode(Values x, int width, float* x_f32, int8_t* codes) {
    float scale, sum;
    if (x.bf16) kernels().load_bf16((const uint16_t*)x.data, width, x_f32);
    kernels().to_int8(x.bf16 ? x_f32 : (const float*)x.data, width, width, codes, &scale, &sum);
    return scale;
}

// Writes one key and one value into strips of codes.
template <int PAIR> void store_codes(Values k, Values v, char* keys, char* values, int lane, int width) {
    const size_t depth = padded(Kind::int8, width);
    float* x_f32 = (float*)thread_buffer(depth * 5);
    int8_t* codes = (int8_t*)(x_f32 + depth);
    ((float*)(keys + STRIP * width))[lane] = encode(k, width, x_f32, codes);
    store_key<PAIR>(codes, (int8_t*)keys, lane, width);
    ((float*)(values + STRIP * width))[lane] = encode(v, width, x_f32, codes);
    store_value<PAIR>(codes, (int8_t*)values, lane, width);
}

}  // namespace

void store_kv(Values k, long k_stride, Values v, long v_stride, const int64_t* slot_mapping, long rows, const Paged& cache) {
    check(cache);
    for (long t = 0; t < rows; t++)
        if (slot_mapping[t] < 0 || slot_mapping[t] >= cache.blocks * cache.block_size)
            throw std::invalid_argument("no such slot");
    constexpr long ROWS_PER_TASK = 32;
    auto task = [&](long i) {
        for (long t = i * ROWS_PER_TASK; t < rows && t < (i + 1) * ROWS_PER_TASK; t++)
            for (int h = 0; h < cache.heads; h++) {
                const int offset = (int)(slot_mapping[t] % cache.block_size), lane = offset % STRIP, width = cache.width;
                const size_t to = cache.strip(slot_mapping[t] / cache.block_size, offset - lane, h);
                const size_t element = cache.bf16 ? 2 : 4;
                char *keys = cache.keys + to, *values = cache.values + to;
                const Values key = {(char*)k.data + (t * k_stride + h * width) * element, cache.bf16};
                const Values value = {(char*)v.data + (t * v_stride + h * width) * element, cache.bf16};
                if (cache.codes && cache.bf16) store_codes<2>(key, value, keys, values, lane, width);
                else if (cache.codes) store_codes<1>(key, value, keys, values, lane, width);
                else if (cache.bf16) {
                    store_key<2>((const uint16_t*)key.data, (uint16_t*)keys, lane, width);
                    store_value<2>((const uint16_t*)value.data, (uint16_t*)values, lane, width);
                } else {
                    store_key<1>((const float*)key.data, (float*)keys, lane, width);
                    store_value<1>((const float*)value.data, (float*)values, lane, width);
                }
            }
    };
    if (rows <= ROWS_PER_TASK) return task(0);
    parallel((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, task);
}

namespace {

// copy(place of a block, its offset in the data, bytes) for each part of each block.
template <class Copy> void for_blocks(const std::vector<Blocks>& parts, const std::vector<long>& blocks, Copy copy) {
    for (long block : blocks)
        for (const Blocks& part : parts)
            if (block < 0 || block >= part.count) throw std::out_of_range("no such block");
    size_t offset = 0;
    for (long block : blocks)
        for (const Blocks& part : parts) copy(part.begin + block * part.bytes, offset, part.bytes), offset += part.bytes;
}

}  // namespace

void export_blocks(const std::vector<Blocks>& parts, const std::vector<long>& blocks, char* data) {
    for_blocks(parts, blocks, [&](char* place, size_t offset, size_t bytes) { std::memcpy(data + offset, place, bytes); });
}

void import_blocks(const std::vector<Blocks>& parts, const std::vector<long>& blocks, const char* data) {
    for_blocks(parts, blocks, [&](char* place, size_t offset, size_t bytes) { std::memcpy(place, data + offset, bytes); });
}

namespace {

// Query rows that read the same keys: all query heads of one key head, for some positions of one sequence.
struct Task {
    int sequence, head, positions, splits;
    long row, position;  // of the first position: its row in the batch, its position in the sequence
};

}  // namespace

void attention(Values q, long stride, int heads, const Paged& cache, const int64_t* block_tables, long columns,
               const int64_t* query_start_loc, const int64_t* seq_lens, long sequences, float scale, Values y) {
    check(cache);
    const int D = cache.width, size = cache.block_size;
    if (!(scale > 0)) throw std::invalid_argument("a scale that is not positive");
    scale *= 1.44269504f;  // log2(e): weights are powers of two
    if (heads < 1 || heads % cache.heads || query_start_loc[0] != 0)
        throw std::invalid_argument("heads or sequences that do not fit together");
    const int q_per_kv = heads / cache.heads;  // query heads per key head
    const int max_positions = q_per_kv < MAX_ROWS ? MAX_ROWS / q_per_kv : 1, M = max_positions * q_per_kv;
    std::vector<Task> tasks;
    long longest = 0;
    for (long s = 0; s < sequences; s++) {
        const long n = query_start_loc[s + 1] - query_start_loc[s], length = seq_lens[s], past = length - n;
        if (n < 1 || past < 0 || length > columns * size)
            throw std::invalid_argument("rows that have no place in their sequence");
        for (long b = 0; b * size < length; b++)
            if (block_tables[s * columns + b] < 0 || block_tables[s * columns + b] >= cache.blocks)
                throw std::invalid_argument("no such block");
        longest = length > longest ? length : longest;
        for (long at = (n - 1) / max_positions * max_positions; at >= 0; at -= max_positions)  // the longest tasks first
            for (int h = 0; h < cache.heads; h++) {
                const int positions = (int)(n - at < max_positions ? n - at : max_positions);
                const int splits = (int)((past + at + positions + SPLIT - 1) / SPLIT);
                tasks.push_back({(int)s, h, positions, splits, query_start_loc[s] + at, past + at});
            }
    }

    const AttentionLoops& ops = kernels().attention;
    const size_t element = cache.bf16 ? 2 : 4, row = tiles(D) * element, state = State::size(M, D);
    // Scratch memory of a thread: a task's queries, its state, the state of a later split, the workspace, and how many keys
    // each row sees.
    const size_t queries_size = tiles(M) * row, state_size = state * 4, work_size = ops.work(M, D);
    auto memory = [&] { return (char*)thread_buffer(queries_size + 2 * state_size + work_size + M * sizeof(long)); };
    auto thread_state = [&] { return State::at((float*)(memory() + queries_size), M, D); };
    // Computes splits begin..end of a task and merges their states into `into`.
    auto attend = [&](const Task& task, int begin, int end, State into) {
        const int m = task.positions * q_per_kv;
        char *queries = memory(), *work = queries + queries_size + 2 * state_size;
        const State part = State::at((float*)(queries + queries_size + state_size), M, D);
        long* seen = (long*)(work + work_size);
        for (int i = 0; i < m; i++) {
            const long t = task.row + i / q_per_kv;
            const Values from = {(char*)q.data + (t * stride + (task.head * q_per_kv + i % q_per_kv) * (long)D) * element,
                                 q.bf16};
            std::memcpy(queries + i * row, from.data, D * element);
            std::memset(queries + i * row + D * element, 0, row - D * element);
            seen[i] = task.position + i / q_per_kv + 1;
        }
        const Sequence keys = {cache, block_tables + task.sequence * columns, task.head};
        for (int split = begin; split < end; split++) {
            const long first = (long)split * SPLIT, last = first + SPLIT < seen[m - 1] ? first + SPLIT : seen[m - 1];
            ops.attend(keys, queries, m, seen, first, last, scale, split > begin ? part : into, work);
            if (split > begin) ops.merge(into, part, m, D, scale);
        }
    };
    auto finish = [&](const Task& task, State done) {
        for (int i = 0; i < task.positions * q_per_kv; i++) {
            const long to = (task.row + i / q_per_kv) * heads + task.head * q_per_kv + i % q_per_kv;
            ops.finish(done, i, D, {(char*)y.data + to * D * (y.bf16 ? 2 : 4), y.bf16});
        }
    };

    if (longest <= SPLIT || (long)tasks.size() >= MIN_TASKS_PER_THREAD * threads()) {
        parallel((long)tasks.size(), [&](long i) {
            attend(tasks[i], 0, tasks[i].splits, thread_state());
            finish(tasks[i], thread_state());
        });
        return;
    }
    // Few rows with many keys: each split is a task; then the splits are merged in the same order as above.
    std::vector<std::pair<int, int>> parts;
    for (size_t i = 0; i < tasks.size(); i++)
        for (int split = 0; split < tasks[i].splits; split++) parts.push_back({(int)i, split});
    float* states = (float*)scratch(0, parts.size() * state * 4);
    parallel((long)parts.size(), [&](long i) {
        const auto [task, split] = parts[i];
        attend(tasks[task], split, split + 1, State::at(states + i * state, M, D));
    });
    std::vector<long> firsts;
    for (size_t i = 0; i < parts.size(); i++)
        if (parts[i].second == 0) firsts.push_back((long)i);
    parallel((long)tasks.size(), [&](long i) {
        const State all = State::at(states + firsts[i] * state, M, D);
        for (int split = 1; split < tasks[i].splits; split++)
            ops.merge(all, State::at(states + (firsts[i] + split) * state, M, D), tasks[i].positions * q_per_kv, D, scale);
        finish(tasks[i], all);
    });
}

}  // namespace glimmer
