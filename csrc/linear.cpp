#include "linear.h"

#include <unistd.h>

#include <cstring>
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

}  // namespace

void experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, const Packed& gate_up, const Packed& down,
             float* y) {
    if (gate_up.parts != 2 || down.parts != 1 || gate_up.count != down.count || gate_up.n != 2 * down.k || gate_up.k != down.n)
        throw std::invalid_argument("gate_up and down do not fit together");
    const long E = gate_up.count, pairs = rows * top_k;
    // Token-expert pairs sorted by expert, tokens in order within one.
    std::vector<long> starts(E + 1, 0), token(pairs), used;
    std::vector<float> score(pairs);
    for (long i = 0; i < pairs; i++) {
        if (ids[i] < 0 || ids[i] >= E) throw std::invalid_argument("an expert that does not exist");
        starts[ids[i] + 1]++;
    }
    for (long e = 0; e < E; e++) {
        if (starts[e + 1]) used.push_back(e);
        starts[e + 1] += starts[e];
    }
    {
        std::vector<long> next(starts.begin(), starts.end() - 1);
        for (long i = 0; i < pairs; i++) {
            long at = next[ids[i]]++;
            token[at] = i / top_k;
            score[at] = scores[i];
        }
    }
    const bool quantised = !is_plain(gate_up.kind);  // quantise once per token, not once per pair
    const long tokens = quantised ? rows : 0;
    Rows each(gate_up, tokens, scratch(0, Rows::bytes(gate_up, tokens))), h(down, pairs, scratch(1, Rows::bytes(down, pairs)));
    if (quantised) fill_rows(each, gate_up, x, rows);

    // A task computes some columns of some experts. It gathers the experts' rows, which stay in the L2 cache for all panels.
    const int M = down.k, H = down.n, halves = gate_up.panels() / 2;
    const bool direct = is_plain(down.kind);
    float* h_f32 = direct ? nullptr : (float*)scratch(2, (size_t)pairs * M * 4);
    const int block = block_rows(each.stride);
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
                    if (quantised) a.copy(r, each, token[first + r]);
                    else set_row(a, gate_up, r, x, token[first + r]);
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
    constexpr long ROWS_PER_TASK = 16;
    if (!direct)
        parallel((pairs + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](long task) {
            for (long i = task * ROWS_PER_TASK; i < pairs && i < (task + 1) * ROWS_PER_TASK; i++) h.set(down, i, h_f32 + i * M);
        });

    // Each task computes some columns of the result over all experts in order: tasks share no output, and the order of every
    // sum is fixed. Few tasks, since each reads all of h; two per thread, so that threads do not wait long for a slow one.
    const int step = (down.panels() + 2 * threads() - 1) / (2 * threads());
    const int down_block = block_rows(h.stride);
    parallel((down.panels() + step - 1) / step, [&](long task) {
        alignas(64) float c[MAX_ROWS * PANEL];
        const int begin = (int)task * step, end = begin + step < down.panels() ? begin + step : down.panels();
        const int from = begin * PANEL, to = end * PANEL < H ? end * PANEL : H;
        for (long t = 0; t < rows; t++) std::memset(y + t * H + from, 0, (size_t)(to - from) * 4);
        for (size_t u = 0; u < used.size(); u++) {
            const long e = used[u];
            for (long first = starts[e]; first < starts[e + 1]; first += down_block) {
                int m = (int)(starts[e + 1] - first < down_block ? starts[e + 1] - first : down_block);
                for (int p = begin; p < end; p++) {
                    int column = p * PANEL, n = H - column < PANEL ? H - column : PANEL;
                    const void* next = p + 1 < end           ? down.panel(e, p + 1)
                                       : u + 1 < used.size() ? down.panel(used[u + 1], begin)
                                                             : nullptr;
                    h.times(down, e, p, first, m, c, next);
                    kernels().add(c, m, n, h.row_scales(down, first), down.panel_scales(e, p), &score[first], &token[first],
                                  y + column, H);
                }
            }
        }
    });
}

}  // namespace glimmer
