#include "linear.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace glimmer {
namespace {

// Rows that one task multiplies by a panel before it turns to the next: they stay in the second-level cache.
int block_rows(const Packed& w, size_t stride) {
    int step = kernels().rows;
    long most = (512 << 10) / (long)stride / step * step;
    return (int)(most < step ? step : most > 128 ? 128 / step * step : most);
    (void)w;
}

void fill_rows(Rows& rows, const Packed& w, Values x, long m) {
    constexpr long FEW = 16;  // rows a task
    parallel((m + FEW - 1) / FEW, [&](long task) {
        for (long i = task * FEW; i < m && i < (task + 1) * FEW; i++) {
            if (x.bf16) rows.set(w, i, (const uint16_t*)x.data + i * w.k);
            else rows.set(w, i, (const float*)x.data + i * w.k);
        }
    });
}

// Panels a task: one while there are few rows, since then a panel is read once; more where rows are read again for each.
int panels_per_task(long m, int panels, int step) {
    int wide = m < 64 ? 1 : 4;
    while (wide > 1 && panels / step / wide < 4 * threads()) wide /= 2;
    return wide;
}

}  // namespace

void linear(Values x, long rows, const Packed& w, const float* bias, Values y) {
    if (w.count != 1 || w.parts != 1) throw std::invalid_argument("linear wants one matrix in one part");
    Turn turn;
    Rows a(w, rows, 0);
    fill_rows(a, w, x, rows);
    const int block = block_rows(w, a.stride), wide = panels_per_task(rows, w.panels(), 1);
    const long blocks = (rows + block - 1) / block, stripes = (w.panels() + wide - 1) / wide;
    parallel(blocks * stripes, [&](long task) {
        alignas(64) float c[128 * PANEL], out[PANEL];
        long first = task / stripes * block;
        int m = (int)(rows - first < block ? rows - first : block);
        int begin = (int)(task % stripes) * wide, end = begin + wide < w.panels() ? begin + wide : w.panels();
        for (int p = begin; p < end; p++) {
            int column = p * PANEL, n = w.n - column < PANEL ? w.n - column : PANEL;
            alignas(64) float b[PANEL] = {};
            if (bias) std::memcpy(b, bias + column, (size_t)n * 4);
            a.times(w, 0, p, first, m, c);
            for (int i = 0; i < m; i++) {
                kernels().finish(c + i * PANEL, a.scale(w, first + i), w.panel_scales(0, p), bias ? b : nullptr, out);
                size_t at = (first + i) * (size_t)w.n + column;
                if (!y.bf16) {
                    std::memcpy((float*)y.data + at, out, (size_t)n * 4);
                } else {
                    alignas(64) uint16_t narrow[PANEL];
                    kernels().to_bf16(out, PANEL, narrow);
                    std::memcpy((uint16_t*)y.data + at, narrow, (size_t)n * 2);
                }
            }
        }
    });
}

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
    Rows each(gate_up, rows, 0), a(gate_up, pairs, 3), h(down, pairs, 6);
    fill_rows(each, gate_up, x, rows);
    constexpr long FEW = 16;
    parallel((pairs + FEW - 1) / FEW, [&](long task) {
        for (long i = task * FEW; i < pairs && i < (task + 1) * FEW; i++) a.copy(i, each, token[i]);
    });

    // Gate and up in one pass. What is to be quantised by the row waits in float32 until the row is whole.
    const int M = down.k, H = down.n, halves = gate_up.panels() / 2;
    const bool direct = down.kind == Kind::f32 || down.kind == Kind::bf16;
    float* wide = direct ? nullptr : (float*)scratch(9, (size_t)pairs * M * 4);
    const int block = block_rows(gate_up, a.stride) / 2;
    parallel((long)used.size() * halves, [&](long task) {
        alignas(64) float gate[64 * PANEL], up[64 * PANEL], out[PANEL];
        const long e = used[task / halves];
        const int j = (int)(task % halves), column = j * PANEL, n = M - column < PANEL ? M - column : PANEL;
        const Kernels& ops = kernels();
        for (long first = starts[e]; first < starts[e + 1]; first += block) {
            int m = (int)(starts[e + 1] - first < block ? starts[e + 1] - first : block);
            a.times(gate_up, e, 2 * j, first, m, gate);
            a.times(gate_up, e, 2 * j + 1, first, m, up);
            for (int i = 0; i < m; i++) {
                float* g = gate + i * PANEL;
                float* u = up + i * PANEL;
                if (gate_up.panel_scales(e, 2 * j)) {
                    ops.finish(g, a.scale(gate_up, first + i), gate_up.panel_scales(e, 2 * j), nullptr, g);
                    ops.finish(u, a.scale(gate_up, first + i), gate_up.panel_scales(e, 2 * j + 1), nullptr, u);
                }
                ops.swiglu(g, u, PANEL, out);
                if (down.kind == Kind::bf16) {
                    alignas(64) uint16_t narrow[PANEL];
                    ops.to_bf16(out, PANEL, narrow);  // columns beyond n are zeros, and so is the padding
                    std::memcpy(h.values + (first + i) * h.stride + column * 2, narrow, PANEL * 2);
                } else {
                    float* to = direct ? (float*)(h.values + (first + i) * h.stride) : wide + (first + i) * M;
                    std::memcpy(to + column, out, (size_t)n * 4);
                }
            }
        }
    });
    if (!direct)
        parallel((pairs + FEW - 1) / FEW, [&](long task) {
            for (long i = task * FEW; i < pairs && i < (task + 1) * FEW; i++) h.set(down, i, wide + i * M);
        });

    // Each task owns columns of the result and walks the experts in order: nothing is shared, and every sum has one order.
    const int step = panels_per_task(rows, down.panels(), 1);
    const int down_block = block_rows(down, h.stride);
    parallel((down.panels() + step - 1) / step, [&](long task) {
        alignas(64) float c[128 * PANEL];
        const int begin = (int)task * step, end = begin + step < down.panels() ? begin + step : down.panels();
        const Kernels& ops = kernels();
        for (long t = 0; t < rows; t++) {
            int stop = end * PANEL < H ? end * PANEL : H;
            std::memset(y + t * H + begin * PANEL, 0, (size_t)(stop - begin * PANEL) * 4);
        }
        for (long e : used)
            for (long first = starts[e]; first < starts[e + 1]; first += down_block) {
                int m = (int)(starts[e + 1] - first < down_block ? starts[e + 1] - first : down_block);
                for (int p = begin; p < end; p++) {
                    int column = p * PANEL, n = H - column < PANEL ? H - column : PANEL;
                    h.times(down, e, p, first, m, c);
                    for (int i = 0; i < m; i++) {
                        float* row = c + i * PANEL;
                        if (down.panel_scales(e, p)) ops.finish(row, h.scale(down, first + i), down.panel_scales(e, p), nullptr, row);
                        ops.add(row, score[first + i], n, y + token[first + i] * H + column);
                    }
                }
            }
    });
}

}  // namespace glimmer
