#include "packed.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "memory.h"
#include "pool.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace glimmer {
namespace {

constexpr size_t ARENA_BYTES = 32 << 20;

// Allocates `bytes` of zeros, 64-byte aligned, from an arena that small matrices share.
std::pair<std::shared_ptr<Arena>, uint8_t*> allocate(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Arena> current;
    std::lock_guard<std::mutex> lock(mutex);
    bytes = round_up(bytes, 64);
    std::shared_ptr<Arena> arena = current.lock();
    if (!arena || arena->size - arena->used < bytes) {
        arena = std::make_shared<Arena>(bytes < ARENA_BYTES ? ARENA_BYTES : bytes);
        current = arena;
    }
    char* begin = arena->base + arena->used;
    arena->used += bytes;
    return {arena, (uint8_t*)begin};
}

// Spreads four nibbles to four bytes, lowest first.
uint32_t spread(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

// The largest float32 exponent (biased) of n scales, at least 1; 255 if a scale is NaN or infinite.
int largest_exponent(const float* scales, int n) {
    int max_exponent = 1;
    for (int i = 0; i < n; i++) max_exponent = std::max(max_exponent, (int)(bits(scales[i]) >> 23 & 255));
    return max_exponent;
}

// 2^(exponent - 127); NaN for 255.
float power_of_two(int exponent) {
    const uint32_t u = exponent < 255 ? (uint32_t)exponent << 23 : 0x7fc00000u;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// The word of scale and zero point of a column for a group (see Groups). The codes become (codes & and_mask) ^ xor_mask.
struct Word { uint32_t bits, and_mask, xor_mask; };

Word scale_word_32(float scale, uint32_t zero_point) {
    return {(scale != scale ? 0x7fc00000u : (bits(scale) + 8) & ~15u) | zero_point, ~0u, 0};
}

Word scale_word_16(float scale, uint32_t zero_point, int top) {
    const uint32_t u = bits(scale);
    const int exponent = (int)(u >> 23 & 255);
    if (exponent == 0 || top - exponent > 31)
        return {zero_point, 0, zero_point * 0x11111111u};  // every code becomes the zero point
    const uint32_t size = (31 - top + exponent) << 11 | (u >> 16 & 0x7f) << 4;
    if (u >> 31) return {size | (15 - zero_point), ~0u, ~0u};  // (c - z) * -s = ((15 - c) - (15 - z)) * s
    return {size | zero_point, ~0u, 0};
}

#if defined(__x86_64__)
// Elements 0..3 of 16 rows: element j of row r goes to to[j * PANEL + r]. Each of these four cache lines is written as a whole,
// past the caches, and so need not be read before.
void transpose_lines(const char* row, size_t stride, uint32_t flip, uint32_t* to) {
    const __m128i flips = _mm_set1_epi32((int)flip);
    for (int r = 0; r < 16; r += 4) {
        __m128i rows[4];
        for (int i = 0; i < 4; i++) rows[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i*)(row + (r + i) * stride)), flips);
        const __m128i a = _mm_unpacklo_epi32(rows[0], rows[1]), b = _mm_unpacklo_epi32(rows[2], rows[3]);
        const __m128i c = _mm_unpackhi_epi32(rows[0], rows[1]), d = _mm_unpackhi_epi32(rows[2], rows[3]);
        _mm_stream_si128((__m128i*)(to + r), _mm_unpacklo_epi64(a, b));
        _mm_stream_si128((__m128i*)(to + PANEL + r), _mm_unpackhi_epi64(a, b));
        _mm_stream_si128((__m128i*)(to + 2 * PANEL + r), _mm_unpacklo_epi64(c, d));
        _mm_stream_si128((__m128i*)(to + 3 * PANEL + r), _mm_unpackhi_epi64(c, d));
    }
}
#endif

// Transposes rows of elements into a panel: element i of row r goes to slot (i, column of r), its bits in `flip` inverted.
template <class T>
void transpose(const char* codes, size_t stride, int rows, int column, int elements, T* panel, T flip = 0) {
    // 128 bytes of each row at a time, the next ones prefetched: the hardware does not prefetch so many streams.
    constexpr int BLOCK = 128 / sizeof(T);
    for (int i = 0; i < elements; i += BLOCK) {
        int end = i + BLOCK < elements ? i + BLOCK : elements, first = 0;
#if defined(__x86_64__)
        if constexpr (sizeof(T) == 4)
            for (; end == i + BLOCK && column % 16 == 0 && first + 16 <= rows; first += 16) {
                const char* row = codes + first * stride + i * sizeof(T);
                for (int r = 0; r < 16; r++)
                    __builtin_prefetch(row + r * stride + 128), __builtin_prefetch(row + r * stride + 192);
                for (int j = 0; j < BLOCK; j += 4)
                    transpose_lines(row + j * sizeof(T), stride, flip, panel + (i + j) * PANEL + column + first);
            }
#endif
        for (int r = first; r < rows; r++) {
            const char* row = codes + r * stride;
            __builtin_prefetch(row + (i + BLOCK) * sizeof(T)), __builtin_prefetch(row + (i + BLOCK) * sizeof(T) + 64);
            for (int j = i; j < end; j++) {
                T value;
                std::memcpy(&value, row + j * sizeof(T), sizeof(T));
                panel[j * PANEL + column + r] = value ^ flip;
            }
        }
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

Packed::Packed(Kind kind, long count, int n, int k, int parts, int group_size, bool wide_scales, bool owns)
    : kind(kind), count(count), n(n), k(k), parts(parts), groups{kind == Kind::int4 ? group_size : 32, wide_scales} {
    bool valid = count > 0 && n > 0 && k > 0 && parts > 0 && n % parts == 0 && groups.size > 0 && groups.size % 32 == 0;
    if (!valid || n > 1 << 24 || k > 1 << 17 || groups.size > 1 << 17)  // 2^17: a row of int8 sums to less than 2^24
        throw std::invalid_argument("no matrix of " + std::to_string(n) + " rows in " + std::to_string(parts) + " parts and " +
                                    std::to_string(k) + " columns in groups of " + std::to_string(group_size));
    places.resize(count);
    size_t codes = round_up(count * matrix_bytes() + 4096, 64);  // loops prefetch a little beyond the end
    taken = owns ? codes + count * scales_bytes() : count * (matrix_bytes() + scales_bytes());
    if (!owns) return;
    uint8_t* data;
    std::tie(arena, data) = allocate(taken);
    for (long e = 0; e < count; e++) place(e, data + e * matrix_bytes(), data + codes + e * scales_bytes());
    // The operating system clears a page when it is first touched. All threads do that here in parallel; fill would do it
    // serially.
    parallel((long)(taken / HUGE_PAGE + 2), [&](long i) {
        const size_t page = round_up((size_t)data + 1, HUGE_PAGE) - HUGE_PAGE + i * HUGE_PAGE, end = (size_t)data + taken;
        for (size_t at = page < (size_t)data ? (size_t)data : page; at < page + HUGE_PAGE && at < end; at += 4096)
            *(volatile uint8_t*)at = 0;
    });
}

void Packed::place(long e, const void* panels, const void* scales, std::shared_ptr<void> memory) {
    if (e < 0 || e >= count) throw std::invalid_argument("no matrix of this number");
    if (memory) keeper = std::move(memory);
    places[e] = {(const uint8_t*)panels, is_plain(kind) ? nullptr : (const float*)scales};
}

size_t Packed::panel_bytes() const {
    size_t d = depth();
    switch (kind) {
        case Kind::f32: return d * PANEL * 4;
        case Kind::f32_bf16:
        case Kind::bf16: return d * PANEL * 2;
        case Kind::int4: return d / groups.size * groups.bytes();
        default: return d * PANEL;
    }
}

void Packed::fill(long e, int first, int rows, const void* codes, size_t stride, const float* row_scales,
                  const uint8_t* zero_points) {
    if (e < 0 || e >= count || first < 0 || rows < 0 || first + rows > n) throw std::invalid_argument("rows out of range");
    if (!arena) throw std::logic_error("these matrices lie in memory that is not ours to fill");
    bool scaled = !is_plain(kind);
    if (scaled != (row_scales != nullptr) || (zero_points && kind != Kind::int4))
        throw std::invalid_argument("scales missing, or scales or zeros not wanted");
    const int width = n / parts;
    const int per_row = (k + groups.size - 1) / groups.size;
    if (kind == Kind::int4 && !groups.wide_scales)
        for (size_t i = 0; i < (size_t)rows * per_row; i++)
            if (bits(row_scales[i]) & 0xffff) throw std::invalid_argument("a scale that is no bf16 number");
    struct Run {
        int row, rows;  // consecutive rows that lie in one panel
    };
    float* const scales = const_cast<float*>(places[e].scales);
    std::vector<Run> runs;
    for (int r = first; r < first + rows; r += runs.back().rows) {
        int at = r % width, done = PANEL - at % PANEL;
        if (done > width - at) done = width - at;
        if (done > first + rows - r) done = first + rows - r;
        runs.push_back({r, done});
    }
    parallel((long)runs.size(), [&](long i) {
        const int r = runs[i].row, done = runs[i].rows;
        const int part = r / width, at = r % width, column = at % PANEL, p = at / PANEL * parts + part;
        uint8_t* panel = const_cast<uint8_t*>(this->panel(e, p));
        const char* source = (const char*)codes + (r - first) * stride;
        // Elements are moved in the units that stay together: 4 bytes are a float, two bf16, or four bytes of int8.
        if (kind == Kind::f32) {
            transpose(source, stride, done, column, k, (uint32_t*)panel);
        } else if (kind == Kind::bf16 || kind == Kind::f32_bf16 || kind == Kind::fp8) {
            int pairs = k / 2;
            if (kind != Kind::fp8) transpose(source, stride, done, column, pairs, (uint32_t*)panel);
            else transpose(source, stride, done, column, pairs, (uint16_t*)panel);
            if (k % 2) {
                size_t unit = kind == Kind::fp8 ? 1 : 2;
                for (int i = 0; i < done; i++)
                    std::memcpy(panel + ((size_t)pairs * PANEL + column + i) * 2 * unit, source + i * stride + (k - 1) * unit,
                                unit);
            }
        } else if (kind == Kind::int8) {
            constexpr uint32_t ADDED = 0x80808080u;  // codes are stored with 128 added; the padding is multiplied by zeros
            transpose(source, stride, done, column, k / 4, (uint32_t*)panel, ADDED);
            for (int i = 0; i < done; i++)
                std::memcpy(panel + ((size_t)(k / 4) * PANEL + column + i) * 4, source + i * stride + k / 4 * 4, k % 4);
            for (int q = k / 4; q < depth() / 4; q++)
                for (int i = 0; i < done; i++) {
                    uint32_t four;
                    uint8_t* slot = panel + ((size_t)q * PANEL + column + i) * 4;
                    std::memcpy(&four, slot, 4);
                    four ^= ADDED;
                    std::memcpy(slot, &four, 4);
                }
        } else {
            for (int i = 0; i < done; i++) {
                const uint8_t* row = (const uint8_t*)source + i * stride;
                const size_t group = (size_t)(r - first + i) * per_row;  // index of the row's first group
                const float* group_scales = row_scales + group;
                const int top = groups.wide_scales ? 0 : largest_exponent(group_scales, per_row);
                scales[p * PANEL + column + i] = groups.wide_scales ? 1.f : power_of_two(top);
                for (int g = 0; g < per_row; g++) {
                    const uint32_t zero_point = zero_points ? zero_points[group + g] : 8;
                    const Word word = groups.wide_scales ? scale_word_32(group_scales[g], zero_point)
                                                         : scale_word_16(group_scales[g], zero_point, top);
                    uint8_t* out = panel + g * groups.bytes();
                    int begin = g * groups.size, end = begin + groups.size < k ? begin + groups.size : k;
                    for (int c = begin; c < end; c += 8) {
                        const int left = end - c;
                        uint32_t eight = 0;
                        std::memcpy(&eight, row + c / 2, left < 8 ? (left + 1) / 2 : 4);
                        if (left < 8) eight &= (1u << left * 4) - 1;
                        eight = spread(eight & 0xffff) | spread(eight >> 16) << 4;
                        eight = (eight & word.and_mask) ^ word.xor_mask;
                        std::memcpy(out + ((c - begin) / 8 * PANEL + column + i) * 4, &eight, 4);
                    }
                    std::memcpy(out + groups.codes() + (column + i) * groups.word(), &word.bits, groups.word());
                }
            }
        }
        if (kind == Kind::fp8 || kind == Kind::int8)
            for (int i = 0; i < done; i++) scales[p * PANEL + column + i] = row_scales[r - first + i];
    });
}

namespace {

// Bytes of a group of an int4 row: codes, scale, sum.
size_t group_stride(const Groups& groups) { return groups.size + 2 * sizeof(float); }

size_t row_stride(const Packed& w) {
    const size_t d = w.depth();
    const size_t stride = is_float32(w.kind)     ? d * 4
                          : w.kind == Kind::int8 ? d
                          : w.kind == Kind::int4 ? d / w.groups.size * group_stride(w.groups)
                                                 : d * 2;
    if (stride < 512) return stride;
    // An odd number of cache lines: rows a power of two apart would conflict in a few sets of the cache.
    const size_t lines = (stride + 63) / 64;
    return (lines + (lines % 2 ? 0 : 1)) * 64;
}

size_t values_size(const Packed& w, long m) { return round_up((m + BEYOND) * row_stride(w), 64); }
size_t scales_size(long m) { return round_up((size_t)(m + BEYOND) * 4, 64); }

}  // namespace

size_t Rows::bytes(const Packed& w, long m) { return values_size(w, m) + 2 * scales_size(m); }

Rows::Rows(const Packed& w, long m, void* memory)
    : values((char*)memory),
      scales((float*)(values + values_size(w, m))),
      sums((float*)((char*)scales + scales_size(m))),
      stride(row_stride(w)) {}

void Rows::set(const Packed& w, long i, const float* x) {
    const Kernels& ops = kernels();
    char* y = values + i * stride;
    switch (w.kind) {
        case Kind::f32:
        case Kind::f32_bf16: std::memcpy(y, x, (size_t)w.k * 4); break;
        case Kind::bf16: ops.to_bf16(x, w.k, (uint16_t*)y); break;
        case Kind::fp8: ops.to_fp8(x, w.k, (uint16_t*)y, scales + i); break;
        case Kind::int8: ops.to_int8(x, w.k, w.depth(), (int8_t*)y, scales + i, sums + i); break;
        case Kind::int4:
            for (int first = 0; first < w.k; first += w.groups.size, y += group_stride(w.groups)) {
                const int size = w.groups.size, n = w.k - first < size ? w.k - first : size;
                ops.to_int8(x + first, n, size, (int8_t*)y, (float*)(y + size), (float*)(y + size) + 1);
            }
            break;
    }
}

void Rows::set(const Packed& w, long i, const uint16_t* x) {
    char* y = values + i * stride;
    if (w.kind == Kind::bf16) {
        std::memcpy(y, x, (size_t)w.k * 2);
        std::memset(y + (size_t)w.k * 2, 0, stride - (size_t)w.k * 2);
        return;
    }
    if (is_float32(w.kind)) return kernels().load_bf16(x, w.k, (float*)y);
    constexpr int MAX_DEPTH = 16384;
    float x_f32[MAX_DEPTH];
    if (w.k > MAX_DEPTH) throw std::length_error("an inner dimension above 16384");
    kernels().load_bf16(x, w.k, x_f32);
    set(w, i, x_f32);
}

void Rows::copy(long i, const Rows& from, long j) {
    std::memcpy(values + i * stride, from.values + j * stride, stride);
    scales[i] = from.scales[j], sums[i] = from.sums[j];
}

void Rows::times(const Packed& w, long e, int p, long first, int m, float* c, const void* next) const {
    const Kernels& ops = kernels();
    const char* a = values + first * stride;
    const uint8_t* panel = w.panel(e, p);
    if (const float* scales = w.panel_scales(e, p)) __builtin_prefetch(scales), __builtin_prefetch(scales + 16);
    int d = w.depth();
    switch (w.kind) {
        case Kind::f32: return ops.f32((const float*)a, stride / 4, m, (const float*)panel, w.k, c, next);
        case Kind::f32_bf16: return ops.f32_bf16((const float*)a, stride / 4, m, (const uint16_t*)panel, w.k, c, next);
        case Kind::bf16: return ops.bf16((const uint16_t*)a, stride / 2, m, (const uint16_t*)panel, w.k, c, next);
        case Kind::fp8: return ops.fp8((const uint16_t*)a, stride / 2, m, panel, w.k, c, next);
        case Kind::int8: return ops.int8((const int8_t*)a, stride, m, panel, w.k, sums + first, c, next);
        case Kind::int4: return ops.int4((const int8_t*)a, stride, m, panel, d, w.groups, c, next);
    }
}

}  // namespace glimmer
