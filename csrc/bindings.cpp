// glimmer._native: what native.py may call. Pointers arrive as integers, from tensors whose type, shape and contiguity
// native.py has checked; sizes are checked again wherever a pointer is made from them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cstring>

#include "linear.h"
#include "pool.h"

namespace nb = nanobind;
using namespace glimmer;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Named {
    const char* name;
    Kind kind;
};
constexpr Named KINDS[] = {
    {"float32", Kind::f32}, {"bfloat16", Kind::bf16}, {"fp8", Kind::fp8}, {"int8", Kind::int8}, {"int4", Kind::int4}};

Kind kind_named(const std::string& name) {
    for (const Named& k : KINDS)
        if (name == k.name) return k.kind;
    throw std::invalid_argument("no kind " + name);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes a second that all threads together read from `bytes` of memory; the best of a few rounds.
double read_bandwidth(size_t bytes) {
    constexpr size_t PIECE = 1 << 17;
    Packed buffer(Kind::fp8, 1, (int)(bytes / PIECE), (int)PIECE, 1, 32, false, false);
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
    using Free = nb::call_guard<nb::gil_scoped_release>;
    m.def("set_threads", &set_threads, Free());
    m.def("threads", &threads);
    m.def("available", &available);
    m.def("isa", [] { return kernels().name; });
    m.def("read_bandwidth", &read_bandwidth, Free());
    m.def("arithmetic", &arithmetic, Free());
    m.def("select", [](const std::string& name) { select(name.c_str()); });

    nb::class_<Packed>(m, "Packed")
        .def("__init__",
             [](Packed* self, const std::string& kind, long count, int n, int k, int parts, int group, bool wide, bool zeros) {
                 new (self) Packed(kind_named(kind), count, n, k, parts, group, wide, zeros);
             })
        .def_ro("count", &Packed::count)
        .def_ro("n", &Packed::n)
        .def_ro("k", &Packed::k)
        .def_ro("parts", &Packed::parts)
        .def_prop_ro("zeros", [](const Packed& p) { return p.kind == Kind::int4 && p.groups.zeros; })
        .def_prop_ro("nbytes", &Packed::bytes)
        .def(
            "fill",
            [](Packed& p, long e, int first, int rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros) {
                p.fill(e, first, rows, at<void>(codes), stride, at<float>(scales), at<uint8_t>(zeros));
            },
            Free());

    m.def(
        "linear",
        [](uintptr_t x, bool x_bf16, long rows, const Packed& w, uintptr_t bias, uintptr_t y, bool y_bf16) {
            linear({at<void>(x), x_bf16}, rows, w, at<float>(bias), {at<void>(y), y_bf16});
        },
        Free());
    m.def(
        "experts",
        [](uintptr_t x, bool x_bf16, long rows, uintptr_t ids, uintptr_t scores, int top_k, const Packed& gate_up,
           const Packed& down, uintptr_t y) {
            experts({at<void>(x), x_bf16}, rows, at<int64_t>(ids), at<float>(scores), top_k, gate_up, down, at<float>(y));
        },
        Free());
}
