#include "attention.h"

#include <cstring>
#include <stdexcept>

#include "pool.h"

namespace glimmer {
namespace {

constexpr int MOST_ROWS = 128;  // of a task
constexpr int FEW_TASKS = 4;    // for each thread: below that, splits are tasks of their own

void check(const Paged& cache) {
    if (cache.block_size < 1 || cache.block_size % STRIP || cache.heads < 1 || cache.width < 2 ||
        cache.width % 2)
        throw std::invalid_argument("a cache that is not laid out in strips");
}

// One key or value into its lane of a strip. PAIR: how many of them lie side by side.
template <int PAIR, class T> void store_key(const T* k, T* strip, int lane, int width) {
    for (int d = 0; d < width; d++) strip[(d / PAIR * STRIP + lane) * PAIR + d % PAIR] = k[d];
}
template <int PAIR, class T> void store_value(const T* v, T* strip, int lane, int width) {
    for (int d = 0; d < width; d++) strip[(lane / PAIR * width + d) * PAIR + lane % PAIR] = v[d];
}

// x (width) as codes; returns their scale.
float encode(Values x, int width, float* wide, int8_t* codes) {
    float scale, sum;
    if (x.bf16) kernels().load_bf16((const uint16_t*)x.data, width, wide);
    kernels().to_int8(x.bf16 ? wide : (const float*)x.data, width, width, codes, &scale, &sum);
    return scale;
}

// The same into strips of codes.
template <int PAIR> void store_codes(Values k, Values v, char* keys, char* values, int lane, int width) {
    const size_t room = padded(Kind::int8, width);
    float* wide = (float*)own(room * 5);
    int8_t* codes = (int8_t*)(wide + room);
    ((float*)(keys + STRIP * width))[lane] = encode(k, width, wide, codes);
    store_key<PAIR>(codes, (int8_t*)keys, lane, width);
    ((float*)(values + STRIP * width))[lane] = encode(v, width, wide, codes);
    store_value<PAIR>(codes, (int8_t*)values, lane, width);
}

}  // namespace

void store_kv(Values k, long k_stride, Values v, long v_stride, const int64_t* slots, long rows, const Paged& cache) {
    check(cache);
    for (long t = 0; t < rows; t++)
        if (slots[t] < 0 || slots[t] >= cache.blocks * cache.block_size) throw std::invalid_argument("no such slot");
    constexpr long FEW = 32;  // rows a task
    auto task = [&](long i) {
        for (long t = i * FEW; t < rows && t < (i + 1) * FEW; t++)
            for (int h = 0; h < cache.heads; h++) {
                const int offset = (int)(slots[t] % cache.block_size), lane = offset % STRIP, width = cache.width;
                const size_t to = cache.strip(slots[t] / cache.block_size, offset - lane, h);
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
    if (rows <= FEW) return task(0);
    parallel((rows + FEW - 1) / FEW, task);
}

namespace {

// Query rows that share their keys: all heads of one key head, for some positions of one sequence.
struct Task {
    int sequence, head, positions, splits;
    long row, position;  // the first of them in the batch, in its sequence
};

}  // namespace

void attention(Values q, long stride, int heads, const Paged& cache, const int64_t* table, long columns,
               const std::vector<long>& starts, const std::vector<long>& lengths, float scale, Values y) {
    check(cache);
    const int D = cache.width, size = cache.block_size;
    if (!(scale > 0)) throw std::invalid_argument("a scale that is not positive");
    if (heads < 1 || heads % cache.heads || starts.size() != lengths.size() + 1 || starts[0] != 0)
        throw std::invalid_argument("heads or sequences that do not fit together");
    const int share = heads / cache.heads, most = share < MOST_ROWS ? MOST_ROWS / share : 1, M = most * share;
    std::vector<Task> tasks;
    long longest = 0;
    for (size_t s = 0; s < lengths.size(); s++) {
        const long n = starts[s + 1] - starts[s], length = lengths[s], past = length - n;
        if (n < 1 || past < 0 || length > columns * size) throw std::invalid_argument("rows that have no place in their sequence");
        for (long b = 0; b * size < length; b++)
            if (table[s * columns + b] < 0 || table[s * columns + b] >= cache.blocks)
                throw std::invalid_argument("no such block");
        longest = length > longest ? length : longest;
        for (long at = (n - 1) / most * most; at >= 0; at -= most)  // the longest first
            for (int h = 0; h < cache.heads; h++) {
                const int positions = (int)(n - at < most ? n - at : most);
                const int splits = (int)((past + at + positions + SPLIT - 1) / SPLIT);
                tasks.push_back({(int)s, h, positions, splits, starts[s] + at, past + at});
            }
    }

    const AttentionLoops& ops = kernels().attention;
    const size_t element = cache.bf16 ? 2 : 4, row = tiles(D) * element, state = State::size(M, D);
    // One thread's memory: a task's queries, its state, that of a later split, what the loops need, what each row sees.
    const size_t queries_size = tiles(M) * row, size_of_state = state * 4, work_size = ops.work(M, D);
    auto memory = [&] { return (char*)own(queries_size + 2 * size_of_state + work_size + M * sizeof(long)); };
    auto own_state = [&] { return State::at((float*)(memory() + queries_size), M, D); };
    // Splits begin..end of a task, merged.
    auto attend = [&](const Task& task, int begin, int end, State into) {
        const int m = task.positions * share;
        char *queries = memory(), *work = queries + queries_size + 2 * size_of_state;
        const State part = State::at((float*)(queries + queries_size + size_of_state), M, D);
        long* seen = (long*)(work + work_size);
        for (int i = 0; i < m; i++) {
            const long t = task.row + i / share;
            const Values from = {(char*)q.data + (t * stride + (task.head * share + i % share) * (long)D) * element, q.bf16};
            std::memcpy(queries + i * row, from.data, D * element);
            std::memset(queries + i * row + D * element, 0, row - D * element);
            seen[i] = task.position + i / share + 1;
        }
        const Sequence keys = {cache, table + task.sequence * columns, task.head};
        for (int split = begin; split < end; split++) {
            const long first = (long)split * SPLIT, last = first + SPLIT < seen[m - 1] ? first + SPLIT : seen[m - 1];
            ops.attend(keys, queries, m, seen, first, last, scale, split > begin ? part : into, work);
            if (split > begin) ops.merge(into, part, m, D);
        }
    };
    auto finish = [&](const Task& task, State done) {
        for (int i = 0; i < task.positions * share; i++) {
            const long to = (task.row + i / share) * heads + task.head * share + i % share;
            ops.finish(done, i, D, {(char*)y.data + to * D * (y.bf16 ? 2 : 4), y.bf16});
        }
    };

    if (longest <= SPLIT || (long)tasks.size() >= FEW_TASKS * threads()) {
        parallel((long)tasks.size(), [&](long i) {
            attend(tasks[i], 0, tasks[i].splits, own_state());
            finish(tasks[i], own_state());
        });
        return;
    }
    // Few rows with many keys: every split by itself, then their merger in the same order as above.
    std::vector<std::pair<int, int>> parts;
    for (size_t i = 0; i < tasks.size(); i++)
        for (int split = 0; split < tasks[i].splits; split++) parts.push_back({(int)i, split});
    Turn turn;
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
            ops.merge(all, State::at(states + (firsts[i] + split) * state, M, D), tasks[i].positions * share, D);
        finish(tasks[i], all);
    });
}

}  // namespace glimmer
