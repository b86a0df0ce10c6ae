// The ops that read and write each number once: embedding, norms, rotary embedding, SwiGLU, routing, tokens that are not
// allowed, the likeliest token, and quantising a weight.
// Not here: matrix products, attention.
#pragma once

#include "kernels.h"

namespace glimmer {

// How the router chooses experts for a token; as RouteRule in glimmer/backends.
struct Rule {
    int top_k, n_group, topk_group;
    bool normed;  // the chosen scores are divided by their sum
    float factor;
};

// All computed in float32. y may be x, but must not overlap it otherwise.
struct SmallLoops {
    // y (n) = x (n) / sqrt(mean(x²) + eps) * weight (n)
    void (*rms_norm)(Values x, long n, Values weight, float eps, Values y);
    // total (n) = residual (n) + x (n)
    void (*add)(Values x, Values residual, long n, Values total);
    // y (n) = silu(x[:n]) * x[n:]
    void (*swiglu)(Values x, long n, Values y);
    // Rotary embedding: rotates pairs (i, i + half) of x by the angles given as cos, sin (half).
    void (*rope)(Values x, const float* cos, const float* sin, long half);
    // scores (n) = 1 / (1 + e^-x)
    void (*sigmoid)(const float* x, long n, float* scores);
    // Quantises a group of n numbers, n even, to int4: codes two per byte, the even one in the low bits. As _to_int4 in
    // glimmer/weight.py.
    void (*to_int4)(Values x, long n, uint8_t* codes, float* scale, uint8_t* zero_point);
    // Quantises a row of n numbers to int8. As _to_int8 in glimmer/weight.py, to the same bits.
    void (*to_int8)(Values x, long n, int8_t* codes, float* scale);
    // x (n) = -infinity where bit i % 8 of byte i / 8 of `allowed` is not set.
    void (*forbid)(float* x, long n, const uint8_t* allowed);
};

// The address of element n of x.
[[gnu::always_inline]] inline Values operator+(Values x, long n) { return {(char*)x.data + n * (x.bf16 ? 2 : 4), x.bf16}; }

// y (count, n) = rows of table (rows, n) for tokens first..first+rows; zeros for other tokens. Both of one type.
void embed(const int64_t* tokens, long count, Values table, long rows, long n, long first, Values y);

// y (rows, heads, n), contiguous, of x whose rows lie `stride` elements apart and whose heads follow each other.
void rms_norm(Values x, long rows, long heads, long n, long stride, Values weight, float eps, Values y);

// total (rows, n) = residual + x, rounded to total's type; y = the norm of the rounded total. All contiguous.
void add_rms_norm(Values x, Values residual, long rows, long n, Values weight, float eps, Values total, Values y);

// y (rows, n) += x.
void add(Values y, Values x, long rows, long n);

// y (rows, n) of x (rows, 2n).
void swiglu(Values x, long rows, long n, Values y);

// Rotary embedding of the first 2 * half elements of each head of q and k (rows, heads, width), in place; rows lie a stride
// apart. cos, sin (rows, half).
struct Heads {
    Values data;
    long count, stride;
};
void rope(Heads q, Heads k, long rows, long width, const float* cos, const float* sin, long half);

// ids, scores (rows, top_k), the best first, equals in ascending order; a NaN counts as best and its score is NaN. Throws
// std::invalid_argument if the rule does not fit the experts.
void route(const float* logits, const float* bias, long rows, long experts, const Rule& rule, int64_t* ids, float* scores);

// x (rows, n), rows `stride` elements apart, = -infinity where the row's bit i % 8 of byte i / 8 of allowed (rows, bytes) is
// not set. Throws std::invalid_argument if there are fewer bits than n.
void forbid(float* x, long stride, long rows, long n, const uint8_t* allowed, long bytes);

// tokens (rows) = the first of the largest of each row of x (rows, n), rows `stride` elements apart; n is at least 1.
void argmax(Values x, long stride, long rows, long n, int64_t* tokens);

// z (rows, n + m), in bytes, of x (rows, n) and y (rows, m), all contiguous.
void concat(const char* x, long n, const char* y, long m, long rows, char* z);

// x (rows, inner), rows `stride` elements apart, inner even -> codes (rows, inner / 2), scales and zero_points (rows, groups).
void quantize_int4(Values x, long stride, long rows, long inner, long group_size, uint8_t* codes, float* scales,
                   uint8_t* zero_points);

// The same -> codes (rows, inner), scales (rows); inner may be odd.
void quantize_int8(Values x, long stride, long rows, long inner, int8_t* codes, float* scales);

}  // namespace glimmer
