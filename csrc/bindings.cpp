// glimmer._native: what native.py may call. Pointers arrive as integers, from tensors whose type, shape and contiguity
// native.py has checked; sizes are checked again wherever a pointer is made from them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "small.h"

namespace nb = nanobind;
using namespace glimmer;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Named {
    const char* name;
    Kind kind;
};
constexpr Named KINDS[] = {
    {"float32", Kind::f32}, {"float32 as bfloat16", Kind::f32_bf16}, {"bfloat16", Kind::bf16}, {"fp8", Kind::fp8},
    {"int8", Kind::int8},   {"int4", Kind::int4}};

Kind kind_named(const std::string& name) {
    for (const Named& k : KINDS)
        if (name == k.name) return k.kind;
    throw std::invalid_argument("no kind " + name);
}

// A chunk in somebody's hands.
struct Lent {
    std::shared_ptr<Shelf> shelf;
    std::unique_ptr<Chunk> chunk;
    ~Lent() { shelf->give_back(std::move(chunk)); }
};

// Calls of doors, to be made again and again without Python.
struct Calls {
    std::vector<std::function<void()>> list;
};

// Defines `name`, and later_`name`, which puts the call on a list and does not make it.
template <class F, class... A> void define(nb::module_& m, const char* name, F f, void (F::*)(A...) const) {
    m.def(name, f, nb::call_guard<nb::gil_scoped_release>());
    m.def((std::string("later_") + name).c_str(), [f](Calls& calls, A... arguments) {
        calls.list.push_back([f, given = std::tuple<A...>(arguments...)] { std::apply(f, given); });
    });
}
template <class F> void door(nb::module_& m, const char* name, F f) { define(m, name, f, &F::operator()); }

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes a second that all threads together read from `bytes` of memory; the best of a few rounds.
double read_bandwidth(size_t bytes) {
    constexpr size_t PIECE = 1 << 17;
    Packed buffer(Kind::fp8, 1, (int)(bytes / PIECE), (int)PIECE, 1, 32, false);
    const uint8_t* data = buffer.panel(0, 0);
    const long pieces = (long)(bytes / PIECE);
    parallel(pieces, [&](long i) { std::memset(const_cast<uint8_t*>(data) + i * PIECE, 1, PIECE); });
    double best = 0;
    for (int round = 0; round < 5; round++) {
        double begin = seconds();
        parallel(pieces, [&](long i) {
            if (kernels().read((const char*)data + i * PIECE, PIECE) == 0) throw std::logic_error("not what was written");
        });
        double rate = (double)(pieces * PIECE) / (seconds() - begin);
        best = rate > best ? rate : best;
    }
    return best;
}

// Multiplications and additions a second of all threads together, in nothing but dot products.
double arithmetic(const std::string& kind) {
    auto burn = kind_named(kind) == Kind::bf16 ? kernels().burn_bf16 : kernels().burn_int8;
    double best = 0, work = 0;
    for (int round = 0; round < 5; round++) {
        double begin = seconds();
        parallel(threads() * 16L, [&](long i) {
            double done = burn(20000);
            if (i == 0) work = done;
        });
        double rate = work * threads() * 16 / (seconds() - begin);
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // an engine that a thread or a traceback still holds at exit is no leak
    using Free = nb::call_guard<nb::gil_scoped_release>;
    m.def("set_threads", &set_threads, Free());
    m.def("threads", &threads);
    m.def("available", &available);
    m.def("isa", [] { return kernels().name; });
    m.def("read_bandwidth", &read_bandwidth, Free());
    m.def("arithmetic", &arithmetic, Free());
    m.def("select", [](const std::string& name) { select(name.c_str()); });

    nb::class_<Shelf>(m, "Shelf")
        .def(nb::init<size_t>())
        // A torch tensor of so many bytes.
        .def("lend", [](std::shared_ptr<Shelf> shelf, size_t bytes) {
            std::unique_ptr<Chunk> chunk = shelf->lend(bytes);
            Lent* lent = new Lent{std::move(shelf), std::move(chunk)};
            nb::capsule owner(lent, [](void* p) noexcept { delete (Lent*)p; });
            return nb::ndarray<nb::pytorch, uint8_t>(lent->chunk->base, {bytes}, owner);
        });

    nb::class_<Packed>(m, "Packed")
        .def("__init__",
             [](Packed* self, const std::string& kind, long count, int n, int k, int parts, int group, bool wide) {
                 new (self) Packed(kind_named(kind), count, n, k, parts, group, wide);
             })
        .def_prop_ro("kind",
                     [](const Packed& p) {
                         return p.kind == Kind::fp8 ? "fp8" : p.kind == Kind::int8 ? "int8" : p.kind == Kind::int4 ? "int4" : "plain";
                     })
        .def_prop_ro("float32", [](const Packed& p) { return is_float32(p.kind); })
        .def_ro("count", &Packed::count)
        .def_ro("n", &Packed::n)
        .def_ro("k", &Packed::k)
        .def_ro("parts", &Packed::parts)
        .def_prop_ro("nbytes", &Packed::bytes)
        .def(
            "fill",
            [](Packed& p, long e, int first, int rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros) {
                p.fill(e, first, rows, at<void>(codes), stride, at<float>(scales), at<uint8_t>(zeros));
            },
            Free());

    nb::class_<Calls>(m, "Calls")
        .def(nb::init<>())
        .def("__call__", [](const Calls& calls) { for (auto& call : calls.list) call(); }, Free());

    door(m, "linear", [](uintptr_t x, bool x_bf16, long rows, const Packed& w, uintptr_t bias, uintptr_t y, bool y_bf16) {
        linear({at<void>(x), x_bf16}, rows, w, at<float>(bias), {at<void>(y), y_bf16});
    });
    door(m, "experts", [](uintptr_t x, bool x_bf16, long rows, uintptr_t ids, uintptr_t scores, int top_k,
                          const Packed& gate_up, const Packed& down, uintptr_t y) {
        experts({at<void>(x), x_bf16}, rows, at<int64_t>(ids), at<float>(scores), top_k, gate_up, down, at<float>(y));
    });

    door(m, "embed", [](uintptr_t tokens, long count, uintptr_t table, bool narrow, long rows, long n, long first,
                        uintptr_t y) {
        embed(at<int64_t>(tokens), count, {at<void>(table), narrow}, rows, n, first, {at<void>(y), narrow});
    });
    door(m, "rms_norm", [](uintptr_t x, bool x_bf16, long rows, long heads, long n, long stride, uintptr_t weight,
                           bool y_bf16, float eps, uintptr_t y) {
        rms_norm({at<void>(x), x_bf16}, rows, heads, n, stride, {at<void>(weight), y_bf16}, eps, {at<void>(y), y_bf16});
    });
    door(m, "add_rms_norm", [](uintptr_t x, bool x_bf16, uintptr_t residual, bool kept_bf16, long rows, long n,
                               uintptr_t weight, bool y_bf16, float eps, uintptr_t total, uintptr_t y) {
        add_rms_norm({at<void>(x), x_bf16}, {at<void>(residual), kept_bf16}, rows, n, {at<void>(weight), y_bf16}, eps,
                     {at<void>(total), kept_bf16}, {at<void>(y), y_bf16});
    });
    door(m, "add", [](uintptr_t y, bool y_bf16, uintptr_t x, bool x_bf16, long rows, long n) {
        add({at<void>(y), y_bf16}, {at<void>(x), x_bf16}, rows, n);
    });
    door(m, "swiglu", [](uintptr_t x, bool narrow, long rows, long n, uintptr_t y) {
        swiglu({at<void>(x), narrow}, rows, n, {at<void>(y), narrow});
    });
    door(m, "rope", [](uintptr_t q, long q_heads, long q_stride, uintptr_t k, long k_heads, long k_stride, bool narrow,
                       long rows, long width, uintptr_t cos, uintptr_t sin, long half) {
        rope({{at<void>(q), narrow}, q_heads, q_stride}, {{at<void>(k), narrow}, k_heads, k_stride}, rows, width,
             at<float>(cos), at<float>(sin), half);
    });
    door(m, "route", [](uintptr_t logits, uintptr_t bias, long rows, long experts, int top_k, int groups, int kept_groups,
                        bool normed, float factor, uintptr_t ids, uintptr_t scores) {
        route(at<float>(logits), at<float>(bias), rows, experts, {top_k, groups, kept_groups, normed, factor},
              at<int64_t>(ids), at<float>(scores));
    });
    m.def(
        "quantize",
        [](uintptr_t x, bool narrow, long stride, long rows, long inner, long group, uintptr_t codes, uintptr_t scales,
           uintptr_t zeros) {
            quantize({at<void>(x), narrow}, stride, rows, inner, group, at<uint8_t>(codes), at<float>(scales), at<uint8_t>(zeros));
        },
        Free());
    door(m, "store_kv", [](uintptr_t k, long k_stride, uintptr_t v, long v_stride, bool narrow, long rows,
                           uintptr_t slots, uintptr_t keys, uintptr_t values, bool codes, long blocks, int block_size,
                           int heads, int width) {
        store_kv({at<void>(k), narrow}, k_stride, {at<void>(v), narrow}, v_stride, at<int64_t>(slots), rows,
                 {at<char>(keys), at<char>(values), narrow, codes, blocks, block_size, heads, width});
    });
    m.def(
        "attention",
        [](uintptr_t q, long stride, int q_heads, bool narrow, uintptr_t keys, uintptr_t values, bool codes, long blocks,
           int block_size, int heads, int width, uintptr_t table, long columns, const std::vector<long>& starts,
           const std::vector<long>& lengths, float scale, uintptr_t y) {
            attention({at<void>(q), narrow}, stride, q_heads,
                      {at<char>(keys), at<char>(values), narrow, codes, blocks, block_size, heads, width},
                      at<int64_t>(table), columns, starts, lengths, scale, {at<void>(y), narrow});
        },
        Free());
}
