#include "linear.h"

#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace glimmer {
namespace {

constexpr int MOST_ROWS = 512;  // of a block
constexpr int FEW_TASKS = 4;  // for each thread, so that none waits long for the last

// Half of a core's second-level cache, in bytes; 512 KB where the system does not say.
long half_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size / 2;
#endif
    return 512 << 10;
}

// Rows that one task multiplies by a panel before it turns to the next: they stay in the second-level cache.
int block_rows(size_t stride) {
    int step = kernels().rows;
    long most = half_cache() / (long)stride / step * step;
    return (int)(most < step ? step : most > MOST_ROWS ? MOST_ROWS / step * step : most);
}

// Row i from row j of x.
void set_row(Rows& rows, const Packed& w, long i, Values x, long j) {
    if (x.bf16) rows.set(w, i, (const uint16_t*)x.data + j * w.k);
    else rows.set(w, i, (const float*)x.data + j * w.k);
}

void fill_rows(Rows& rows, const Packed& w, Values x, long m) {
    constexpr long FEW = 16;  // rows a task
    parallel((m + FEW - 1) / FEW, [&](long task) {
        for (long i = task * FEW; i < m && i < (task + 1) * FEW; i++) set_row(rows, w, i, x, i);
    });
}

// Panels a task, as many as leave every thread a few tasks: neighbours in memory are read in one stream, and rows are
// read once for all of them.
int panels_per_task(long tasks, int most) {
    long wide = tasks / (FEW_TASKS * threads());
    return (int)(wide < 1 ? 1 : wide > most ? most : wide);
}

}  // namespace

void linear(Values x, long rows, const Packed& w, const float* bias, Values y) {
    if (w.count != 1 || w.parts != 1) throw std::invalid_argument("linear wants one matrix in one part");
    Turn turn;
    Rows a(w, rows, scratch(0, Rows::bytes(w, rows)));
    fill_rows(a, w, x, rows);
    const int block = block_rows(a.stride), wide = panels_per_task(w.panels(), 8);
    const long blocks = (rows + block - 1) / block, stripes = (w.panels() + wide - 1) / wide;
    parallel(blocks * stripes, [&](long task) {
        alignas(64) float c[MOST_ROWS * PANEL];
        long first = task / stripes * block;
        int m = (int)(rows - first < block ? rows - first : block);
        int begin = (int)(task % stripes) * wide, end = begin + wide < w.panels() ? begin + wide : w.panels();
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

// Columns 32j.. of silu(gate) * up for the m rows of a, to rows first.. of h where the second product wants floats or bf16,
// else to `wide` (rows, M), since what is quantised by the row waits until the row is whole.
void gate_and_up(const Rows& a, const Packed& w, long e, int j, int m, const void* next, long first, Rows& h,
                 const Packed& down, float* wide) {
    alignas(64) float gate[MOST_ROWS * PANEL], up[MOST_ROWS * PANEL];
    const int M = down.k, column = j * PANEL, n = M - column < PANEL ? M - column : PANEL;
    a.times(w, e, 2 * j, 0, m, gate, w.panel(e, 2 * j + 1));
    a.times(w, e, 2 * j + 1, 0, m, up, next);
    const bool bf16 = down.kind == Kind::bf16;
    char* row = h.values + first * h.stride;
    void* to = bf16 ? (void*)((uint16_t*)row + column) : (wide ? wide + first * M : (float*)row) + column;
    // In bf16 all 32 columns: those beyond M are zeros, as the padding must be.
    kernels().gated(gate, up, m, bf16 ? PANEL : n, a.row_scales(w, 0), w.panel_scales(e, 2 * j), w.panel_scales(e, 2 * j + 1),
                    to, bf16 ? h.stride / 2 : wide ? M : h.stride / 4, bf16);
}

}  // namespace

void experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, const Packed& gate_up,
             const Packed& down, float* y) {
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
    Turn turn;
    const bool quantised = !is_plain(gate_up.kind);  // once a token, not once a pair
    const long tokens = quantised ? rows : 0;
    Rows each(gate_up, tokens, scratch(0, Rows::bytes(gate_up, tokens))), h(down, pairs, scratch(1, Rows::bytes(down, pairs)));
    if (quantised) fill_rows(each, gate_up, x, rows);

    // A task is some columns of some experts, whose rows it gathers: they come from the second-level cache for each panel.
    const int M = down.k, H = down.n, halves = gate_up.panels() / 2;
    const bool direct = is_plain(down.kind);
    float* wide = direct ? nullptr : (float*)scratch(2, (size_t)pairs * M * 4);
    const int block = block_rows(each.stride);
    const long all = (long)used.size() * halves, run = panels_per_task(all, halves);
    parallel((all + run - 1) / run, [&](long task) {
        Rows a(gate_up, block, own(Rows::bytes(gate_up, block)));
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
                    gate_and_up(a, gate_up, e, j, m, next, first, h, down, wide);
                }
            }
        }
    });
    constexpr long FEW = 16;
    if (!direct)
        parallel((pairs + FEW - 1) / FEW, [&](long task) {
            for (long i = task * FEW; i < pairs && i < (task + 1) * FEW; i++) h.set(down, i, wide + i * M);
        });

    // Each task owns columns of the result and walks the experts in order: nothing is shared, and every sum has one order.
    // Few tasks, since each reads all of h; two a thread, so that a slow one does not keep the others waiting for long.
    const int step = (down.panels() + 2 * threads() - 1) / (2 * threads());
    const int down_block = block_rows(h.stride);
    parallel((down.panels() + step - 1) / step, [&](long task) {
        alignas(64) float c[MOST_ROWS * PANEL];
        const int begin = (int)task * step, end = begin + step < down.panels() ? begin + step : down.panels();
        const int from = begin * PANEL, to = end * PANEL < H ? end * PANEL : H;
        for (long t = 0; t < rows; t++) std::memset(y + t * H + from, 0, (size_t)(to - from) * 4);
        for (size_t u = 0; u < used.size(); u++) {
            const long e = used[u];
            for (long first = starts[e]; first < starts[e + 1]; first += down_block) {
                int m = (int)(starts[e + 1] - first < down_block ? starts[e + 1] - first : down_block);
                for (int p = begin; p < end; p++) {
                    int column = p * PANEL, n = H - column < PANEL ? H - column : PANEL;
                    const void* next = p + 1 < end ? down.panel(e, p + 1) : u + 1 < used.size() ? down.panel(used[u + 1], begin) : nullptr;
                    h.times(down, e, p, first, m, c, next);
                    kernels().add(c, m, n, h.row_scales(down, first), down.panel_scales(e, p), &score[first], &token[first],
                                  y + column, H);
                }
            }
        }
    });
}

}  // namespace glimmer
