#include "linear.h"

#include <unistd.h>

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace glimmer {
namespace {

constexpr int MAX_ROWS = 512;            // of a block
constexpr int MIN_TASKS_PER_THREAD = 4;  // so that threads finish at nearly the same time

// Half of a core's L2 cache, in bytes; 512 KB if the system does not report its size.
long half_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size / 2;
#endif
    return 512 << 10;
}

// Number of rows that a task multiplies by a panel before it goes to the next panel, so that they stay in the L2 cache.
int block_rows(size_t stride) {
    int step = kernels().rows;
    long rows = half_cache() / (long)stride / step * step;
    return (int)(rows < step ? step : rows > MAX_ROWS ? MAX_ROWS / step * step : rows);
}

// Sets row i of `rows` from row j of x.
void set_row(Rows& rows, const Packed& w, long i, Values x, long j) {
    if (x.bf16) rows.set(w, i, (const uint16_t*)x.data + j * w.k);
    else rows.set(w, i, (const float*)x.data + j * w.k);
}

void fill_rows(Rows& rows, const Packed& w, Values x, long m) {
    constexpr long ROWS_PER_TASK = 16;  // rows a task
    parallel((m + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](long task) {
        for (long i = task * ROWS_PER_TASK; i < m && i < (task + 1) * ROWS_PER_TASK; i++) set_row(rows, w, i, x, i);
    });
}

// Number of panels of a task, as many as leave MIN_TASKS_PER_THREAD tasks for each thread: adjacent panels are read as one
// stream of memory, and rows are read once for all of them.
int panels_per_task(long tasks, int max_panels) {
    long panels = tasks / (MIN_TASKS_PER_THREAD * threads());
    return (int)(panels < 1 ? 1 : panels > max_panels ? max_panels : panels);
}

}  // namespace

void linear(Values x, long rows, const Packed& w, const float* bias, Values y) {
    if (w.count != 1 || w.parts != 1) throw std::invalid_argument("linear wants one matrix in one part");
    Rows a(w, rows, scratch(0, Rows::bytes(w, rows)));
    fill_rows(a, w, x, rows);
    const int block = block_rows(a.stride), per_task = panels_per_task(w.panels(), 8);
    const long blocks = (rows + block - 1) / block, stripes = (w.panels() + per_task - 1) / per_task;
    parallel(blocks * stripes, [&](long task) {
        alignas(64) float c[MAX_ROWS * PANEL];
        long first = task / stripes * block;
        int m = (int)(rows - first < block ? rows - first : block);
        int begin = (int)(task % stripes) * per_task, end = begin + per_task < w.panels() ? begin + per_task : w.panels();
        for (int p = begin; p < end; p++) {
            int column = p * PANEL, n = w.n - column < PANEL ? w.n - column : PANEL;
            size_t at = first * (size_t)w.n + column;
            a.times(w, 0, p, first, m, c, p + 1 < end ? w.panel(0, p + 1) : nullptr);
            kernels().finish(c, m, n, a.row_scales(w, first), w.panel_scales(0, p), bias ? bias + column : nullptr,
                             y.bf16 ? (void*)((uint16_t*)y.data + at) : (float*)y.data + at, w.n, y.bf16);
        }
    });
}

namespace {

// Computes columns 32j.. of silu(gate) * up for the m rows of a. They are written to rows first.. of h if the down projection
// takes float32 or bf16, else to `h_f32` (rows, M): a row can be quantised only after it is complete.
void gate_and_up(const Rows& a, const Packed& w, long e, int j, int m, const void* next, long first, Rows& h,
                 const Packed& down, float* h_f32) {
    alignas(64) float gate[MAX_ROWS * PANEL], up[MAX_ROWS * PANEL];
    const int M = down.k, column = j * PANEL, n = M - column < PANEL ? M - column : PANEL;
    a.times(w, e, 2 * j, 0, m, gate, w.panel(e, 2 * j + 1));
    a.times(w, e, 2 * j + 1, 0, m, up, next);
    const bool bf16 = down.kind == Kind::bf16;
    char* row = h.values + first * h.stride;
    void* to = bf16 ? (void*)((uint16_t*)row + column) : (h_f32 ? h_f32 + first * M : (float*)row) + column;
    // In bf16 all 32 columns are written: those beyond M are zeros, as the padding must be.
    kernels().gated(gate, up, m, bf16 ? PANEL : n, a.row_scales(w, 0), w.panel_scales(e, 2 * j), w.panel_scales(e, 2 * j + 1),
                    to,
                    bf16    ? h.stride / 2
                    : h_f32 ? M
                            : h.stride / 4,
                    bf16);
}

// Token-expert pairs sorted by expert, tokens in order within one.
struct Pairs {
    std::vector<long> starts, token, used;  // used: the experts that a token has chosen; starts: the first pair of each expert
    std::vector<float> score;

    Pairs(const int64_t* ids, const float* scores, long rows, int top_k, long E)
        : starts(E + 1, 0), token(rows * top_k), score(rows * top_k) {
        const long pairs = rows * top_k;
        for (long i = 0; i < pairs; i++) {
            if (ids[i] < 0 || ids[i] >= E) throw std::invalid_argument("an expert that does not exist");
            starts[ids[i] + 1]++;
        }
        for (long e = 0; e < E; e++) {
            if (starts[e + 1]) used.push_back(e);
            starts[e + 1] += starts[e];
        }
        std::vector<long> next(starts.begin(), starts.end() - 1);
        for (long i = 0; i < pairs; i++) {
            const long at = next[ids[i]]++;
            token[at] = i / top_k;
            score[at] = scores[i];
        }
    }
};

// The experts of a step. Each expert is computed in two parts: `up` for it alone, in any order, then `down` in the order of the
// experts' numbers, in which their outputs are added up.
class Experts {
public:
    Experts(Values x, long rows, const Pairs& pairs, const Packed& gate_up, const Packed& down, float* y)
        : x(x),
          rows(rows),
          pairs(pairs),
          gate_up(gate_up),
          down(down),
          y(y),
          quantised(!is_plain(gate_up.kind)),
          direct(is_plain(down.kind)),
          each(gate_up, quantised ? rows : 0, scratch(0, Rows::bytes(gate_up, quantised ? rows : 0))),
          h(down, (long)pairs.token.size(), scratch(1, Rows::bytes(down, (long)pairs.token.size()))),
          h_f32(direct ? nullptr : (float*)scratch(2, pairs.token.size() * (size_t)down.k * 4)) {
        if (quantised) fill_rows(each, gate_up, x, rows);  // quantise once per token, not once per pair
    }

    // silu(gate) * up of some experts' pairs, into h.
    void up(const std::vector<long>& used) {
        // A task computes some columns of some experts. It gathers the experts' rows, which stay in the L2 cache for all panels.
        const std::vector<long>& starts = pairs.starts;
        const int halves = gate_up.panels() / 2, block = block_rows(each.stride);
        const long all = (long)used.size() * halves, run = panels_per_task(all, halves);
        parallel((all + run - 1) / run, [&](long task) {
            Rows a(gate_up, block, thread_buffer(Rows::bytes(gate_up, block)));
            const long end = (task + 1) * run < all ? (task + 1) * run : all;
            for (long i = task * run, after; i < end; i = after) {
                const long e = used[i / halves], left = end - i;
                const int from = (int)(i % halves), to = left < halves - from ? from + (int)left : halves;
                after = i + to - from;
                for (long first = starts[e]; first < starts[e + 1]; first += block) {
                    const int m = (int)(starts[e + 1] - first < block ? starts[e + 1] - first : block);
                    for (int r = 0; r < m; r++) {
                        if (quantised) a.copy(r, each, pairs.token[first + r]);
                        else set_row(a, gate_up, r, x, pairs.token[first + r]);
                    }
                    for (int j = from; j < to; j++) {
                        const void* next = j + 1 < to                      ? gate_up.panel(e, 2 * j + 2)
                                           : first + block < starts[e + 1] ? gate_up.panel(e, 2 * from)
                                           : after < end                   ? gate_up.panel(used[after / halves], 0)
                                                                           : nullptr;
                        gate_and_up(a, gate_up, e, j, m, next, first, h, down, h_f32);
                    }
                }
            }
        });
        if (direct) return;
        std::vector<long> which;  // pairs of these experts
        for (long e : used)
            for (long i = starts[e]; i < starts[e + 1]; i++) which.push_back(i);
        constexpr long ROWS_PER_TASK = 16;
        const long count = (long)which.size();
        parallel((count + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](long task) {
            for (long i = task * ROWS_PER_TASK; i < count && i < (task + 1) * ROWS_PER_TASK; i++)
                h.set(down, which[i], h_f32 + which[i] * down.k);
        });
    }

    // Adds up the outputs of some experts, in ascending order after those of earlier calls; `begin`: there were none.
    void add(const std::vector<long>& used, bool begin) {
        // Each task computes some columns of the result over all experts in order: tasks share no output, and the order of every
        // sum is fixed. Few tasks, since each reads all of h; two per thread, so that threads do not wait long for a slow one.
        const std::vector<long>& starts = pairs.starts;
        const int H = down.n, step = (down.panels() + 2 * threads() - 1) / (2 * threads()), block = block_rows(h.stride);
        parallel((down.panels() + step - 1) / step, [&](long task) {
            alignas(64) float c[MAX_ROWS * PANEL];
            const int low = (int)task * step, high = low + step < down.panels() ? low + step : down.panels();
            const int from = low * PANEL, to = high * PANEL < H ? high * PANEL : H;
            for (long t = 0; begin && t < rows; t++) std::memset(y + t * H + from, 0, (size_t)(to - from) * 4);
            for (size_t u = 0; u < used.size(); u++) {
                const long e = used[u];
                for (long first = starts[e]; first < starts[e + 1]; first += block) {
                    int m = (int)(starts[e + 1] - first < block ? starts[e + 1] - first : block);
                    for (int p = low; p < high; p++) {
                        int column = p * PANEL, n = H - column < PANEL ? H - column : PANEL;
                        const void* next = p + 1 < high          ? down.panel(e, p + 1)
                                           : u + 1 < used.size() ? down.panel(used[u + 1], low)
                                                                 : nullptr;
                        h.times(down, e, p, first, m, c, next);
                        kernels().add(c, m, n, h.row_scales(down, first), down.panel_scales(e, p), &pairs.score[first],
                                      &pairs.token[first], y + column, H);
                    }
                }
            }
        });
    }

private:
    const Values x;
    const long rows;
    const Pairs& pairs;
    const Packed &gate_up, &down;
    float* const y;
    const bool quantised, direct;
    Rows each, h;
    float* const h_f32;
};

void check_pair(const Packed& gate_up, const Packed& down) {
    if (gate_up.parts != 2 || down.parts != 1 || gate_up.count != down.count || gate_up.n != 2 * down.k || gate_up.k != down.n)
        throw std::invalid_argument("gate_up and down do not fit together");
}

constexpr size_t MAX_MISSES = 16;  // experts that are read in one wave
constexpr size_t MAX_AHEAD = 64;   // and for the next layer: what a disk reads while attention is computed

// The wave that begins with used[at]: experts in ascending order, not more than can be held while another wave is.
std::vector<long> wave(const std::vector<long>& used, size_t at, ExpertStore& store, int layer,
                       size_t max_misses = MAX_MISSES) {
    std::vector<long> found;
    size_t misses = 0;
    const size_t most = (size_t)(store.half() < 1 ? 1 : store.half());
    for (; at < used.size() && found.size() < most; at++) {
        if (!store.present(layer, used[at]) && ++misses > max_misses) break;
        found.push_back(used[at]);
    }
    return found;
}

// Begins to read the first experts of a layer that nearly all will be wanted of: the disk has nothing to do otherwise until
// that layer's attention has been computed and its router has spoken.
void fetch_ahead(ExpertStore& store, int layer) {
    if (layer >= store.num_layers()) return;
    std::vector<long> all(store.gate_up(layer).count);
    std::iota(all.begin(), all.end(), 0L);
    store.fetch(layer, wave(all, 0, store, layer, MAX_AHEAD));
}

}  // namespace

void experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, const Packed& gate_up, const Packed& down,
             float* y) {
    check_pair(gate_up, down);
    const Pairs pairs(ids, scores, rows, top_k, gate_up.count);
    Experts all(x, rows, pairs, gate_up, down, y);
    all.up(pairs.used);
    all.add(pairs.used, true);
}

void stored_experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, ExpertStore& store, int layer,
                    float* y) {
    if (layer < 0 || layer >= store.num_layers()) throw std::invalid_argument("no layer of this number");
    const Packed &gate_up = store.gate_up(layer), &down = store.down(layer);
    check_pair(gate_up, down);
    const Pairs pairs(ids, scores, rows, top_k, gate_up.count);
    std::vector<long> tokens;
    for (long e : pairs.used) tokens.push_back(pairs.starts[e + 1] - pairs.starts[e]);
    store.count(layer, pairs.used, tokens, rows);
    std::vector<long> now = wave(pairs.used, 0, store, layer), after;
    ExpertStore::Hold held = store.hold(layer, now, true), next;
    Experts all(x, rows, pairs, gate_up, down, y);
    for (size_t done = 0; done < pairs.used.size(); done += now.size(), now = std::move(after), held = std::move(next)) {
        if (!held) held = store.hold(layer, now, true);
        if (!held) throw std::runtime_error("has more experts in one step than there are slots");
        after = wave(pairs.used, done + now.size(), store, layer);
        if (!after.empty()) next = store.hold(layer, after, false);
        else if (pairs.used.size() * 8 >= (size_t)gate_up.count * 7) fetch_ahead(store, layer + 1);
        for (std::vector<long> some = held.arrived(); !some.empty(); some = held.arrived()) all.up(some);
        all.add(now, done == 0);
    }
}

void fetch_experts(const int64_t* ids, long count, ExpertStore& store, int layer) {
    if (layer < 0 || layer >= store.num_layers()) throw std::invalid_argument("no layer of this number");
    std::vector<bool> chosen(store.gate_up(layer).count);
    std::vector<long> used;
    for (long i = 0; i < count; i++)
        if (ids[i] >= 0 && ids[i] < (long)chosen.size()) chosen[ids[i]] = true;
    for (size_t e = 0; e < chosen.size(); e++)
        if (chosen[e]) used.push_back((long)e);
    store.fetch(layer, wave(used, 0, store, layer));
}

}  // namespace glimmer
