#include "small.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace glimmer {
namespace {

constexpr long SERIAL_LIMIT = 1 << 15;  // numbers: one thread has computed fewer before a second one would have started
constexpr long TASK = 1 << 13;          // numbers of a task

// Calls f(i) for each row i, in parallel if the work, `width` numbers per row, is large enough.
template <class F> void over(long rows, long width, F f) {
    if (rows * width < SERIAL_LIMIT) {
        for (long i = 0; i < rows; i++) f(i);
        return;
    }
    const long each = TASK / width + 1;
    parallel((rows + each - 1) / each, [&](long task) {
        for (long i = task * each; i < rows && i < (task + 1) * each; i++) f(i);
    });
}

}  // namespace

void embed(const int64_t* tokens, long count, Values table, long rows, long n, long first, Values y) {
    const size_t bytes = (size_t)n * (table.bf16 ? 2 : 4);
    over(count, n, [&](long t) {
        const int64_t row = tokens[t] - first;
        char* out = (char*)y.data + t * bytes;
        if (row >= 0 && row < rows) std::memcpy(out, (const char*)table.data + row * bytes, bytes);
        else std::memset(out, 0, bytes);
    });
}

void rms_norm(Values x, long rows, long heads, long n, long stride, Values weight, float eps, Values y) {
    const SmallLoops& ops = kernels().small;
    over(rows, heads * n, [&](long t) {
        for (long h = 0; h < heads; h++) ops.rms_norm(x + t * stride + h * n, n, weight, eps, y + (t * heads + h) * n);
    });
}

void add_rms_norm(Values x, Values residual, long rows, long n, Values weight, float eps, Values total, Values y) {
    const SmallLoops& ops = kernels().small;
    over(rows, n, [&](long t) {
        ops.add(x + t * n, residual + t * n, n, total + t * n);
        ops.rms_norm(total + t * n, n, weight, eps, y + t * n);
    });
}

void add(Values y, Values x, long rows, long n) {
    const SmallLoops& ops = kernels().small;
    over(rows, n, [&](long t) { ops.add(x + t * n, y + t * n, n, y + t * n); });
}

void swiglu(Values x, long rows, long n, Values y) {
    const SmallLoops& ops = kernels().small;
    over(rows, 2 * n, [&](long t) { ops.swiglu(x + t * 2 * n, n, y + t * n); });
}

void rope(Heads q, Heads k, long rows, long width, const float* cos, const float* sin, long half) {
    const SmallLoops& ops = kernels().small;
    over(rows, (q.count + k.count) * 2 * half, [&](long t) {
        for (const Heads& x : {q, k})
            for (long h = 0; h < x.count; h++)
                ops.rope(x.data + t * x.stride + h * width, cos + t * half, sin + t * half, half);
    });
}

namespace {

// The indices of the `wanted` best of n choices, best first.
void best_of(const float* choice, long n, int wanted, long* best) {
    int found = 0;
    for (long i = 0; i < n; i++) {
        if (found == wanted && !(choice[i] > choice[best[found - 1]])) continue;
        int at = found < wanted ? found++ : wanted - 1;
        for (; at > 0 && choice[i] > choice[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = i;
    }
}

void route_one(const float* logits, const float* bias, long experts, const Rule& rule, int64_t* ids, float* out) {
    thread_local std::vector<float> numbers;
    thread_local std::vector<long> places;
    numbers.resize(2 * experts + rule.n_group);
    places.resize(rule.top_k + rule.n_group);
    float *scores = numbers.data(), *choice = scores + experts, *of_group = choice + experts;
    long *best = places.data(), *kept = best + rule.top_k;
    kernels().small.sigmoid(logits, experts, scores);
    for (long e = 0; e < experts; e++) {
        choice[e] = scores[e] + bias[e];
        if (choice[e] != choice[e]) choice[e] = INFINITY;  // since NaN compares false with everything
    }
    if (rule.n_group > 1) {
        const long size = experts / rule.n_group;
        for (int g = 0; g < rule.n_group; g++) {
            long two[2];
            best_of(choice + g * size, size, 2, two);
            of_group[g] = choice[g * size + two[0]] + choice[g * size + two[1]];
            if (of_group[g] != of_group[g]) of_group[g] = INFINITY;  // infinity and -infinity
        }
        best_of(of_group, rule.n_group, rule.topk_group, kept);
        for (int g = 0; g < rule.n_group; g++) {
            bool stays = false;
            for (int i = 0; i < rule.topk_group; i++) stays |= kept[i] == g;
            for (long e = g * size; !stays && e < (g + 1) * size; e++) choice[e] = -INFINITY;
        }
    }
    best_of(choice, experts, rule.top_k, best);
    float sum = rule.normed ? 1e-20f : 1.f;
    for (int j = 0; rule.normed && j < rule.top_k; j++) sum += scores[best[j]];
    for (int j = 0; j < rule.top_k; j++) {
        ids[j] = best[j];
        out[j] = scores[best[j]] / sum * rule.factor;
    }
}

}  // namespace

void route(const float* logits, const float* bias, long rows, long experts, const Rule& rule, int64_t* ids, float* scores) {
    const bool grouped = rule.n_group > 1;
    if (rule.top_k < 1 || rule.top_k > experts || rule.n_group < 1 ||
        (grouped &&
         (experts % rule.n_group || experts / rule.n_group < 2 || rule.topk_group < 1 || rule.topk_group > rule.n_group)))
        throw std::invalid_argument("a rule that does not fit the experts");
    over(rows, 8 * experts,
         [&](long t) { route_one(logits + t * experts, bias, experts, rule, ids + t * rule.top_k, scores + t * rule.top_k); });
}

void forbid(float* x, long stride, long rows, long n, const uint8_t* allowed, long bytes) {
    if (bytes < (n + 7) / 8) throw std::invalid_argument("fewer bits than numbers");
    const SmallLoops& ops = kernels().small;
    over(rows, n, [&](long r) { ops.forbid(x + r * stride, n, allowed + r * bytes); });
}

namespace {

// The first place of the largest of value(x[i]); a NaN is never the largest, unless it is the first.
template <class T, class F> long first_of_largest(const T* x, long n, F value) {
    long best = 0;
    auto largest = value(x[0]);
    for (long i = 1; i < n; i++) {
        const auto own = value(x[i]);
        if (own > largest) largest = own, best = i;
    }
    return best;
}

}  // namespace

void argmax(Values x, long stride, long rows, long n, int64_t* tokens) {
    if (n < 1) throw std::invalid_argument("the largest of no numbers");
    over(rows, n, [&](long r) {
        const Values row = x + r * stride;
        if (row.bf16) {
            tokens[r] = first_of_largest((const uint16_t*)row.data, n, [](uint16_t bits) {
                const uint32_t wide = (uint32_t)bits << 16;
                float number;
                std::memcpy(&number, &wide, sizeof number);
                return number;
            });
        } else {
            tokens[r] = first_of_largest((const float*)row.data, n, [](float number) { return number; });
        }
    });
}

void concat(const char* x, long n, const char* y, long m, long rows, char* z) {
    for (long r = 0; r < rows; r++) {
        std::memcpy(z + r * (n + m), x + r * n, n);
        std::memcpy(z + r * (n + m) + n, y + r * m, m);
    }
}

void quantize_int4(Values x, long stride, long rows, long inner, long group_size, uint8_t* codes, float* scales,
                   uint8_t* zero_points) {
    if (inner < 2 || inner % 2 || group_size < 2 || group_size % 2) throw std::invalid_argument("columns that do not pair");
    const SmallLoops& ops = kernels().small;
    const long groups = (inner + group_size - 1) / group_size;
    over(rows, inner, [&](long r) {
        for (long g = 0; g < groups; g++) {
            const long first = g * group_size, n = inner - first < group_size ? inner - first : group_size;
            ops.to_int4(x + (r * stride + first), n, codes + (r * inner + first) / 2, scales + r * groups + g,
                        zero_points + r * groups + g);
        }
    });
}

void quantize_int8(Values x, long stride, long rows, long inner, int8_t* codes, float* scales) {
    const SmallLoops& ops = kernels().small;
    over(rows, inner, [&](long r) { ops.to_int8(x + r * stride, inner, codes + r * inner, scales + r); });
}

}  // namespace glimmer
