// The Python module glimmer._native. Pointers arrive as integers (`tensor.data_ptr()`), from tensors whose dtype, shape and
// contiguity the Python caller has checked. Sizes are checked again here wherever a pointer is computed from them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "files.h"
#include "linear.h"
#include "mapped.h"
#include "memory.h"
#include "pool.h"
#include "small.h"
#include "store.h"

namespace nb = nanobind;
using namespace glimmer;
using namespace nb::literals;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Named {
    const char* name;
    Kind kind;
};
constexpr Named KINDS[] = {{"float32", Kind::f32},   {"float32 as bfloat16", Kind::f32_bf16},
                           {"bfloat16", Kind::bf16}, {"fp8", Kind::fp8},
                           {"int8", Kind::int8},     {"int4", Kind::int4}};

Kind kind_named(const std::string& name) {
    for (const Named& k : KINDS)
        if (name == k.name) return k.kind;
    throw std::invalid_argument("no kind " + name);
}

// Owns an arena of a buffer pool, and releases it to the pool at the end. Held by the torch tensor that lies in the arena.
struct Lease {
    std::shared_ptr<BufferPool> pool;
    std::unique_ptr<Arena> arena;
    ~Lease() { pool->release(std::move(arena)); }
};

// A list of calls of ops with their arguments, which runs any number of times without Python.
struct CallList { std::vector<std::function<void()>> calls; };

// Binds the op `name` and, if a step may contain it, queue_`name`, which appends the same call to a CallList and does not run
// it. names: one for each argument.
template <bool QUEUED, class F, class R, class... A, class... N>
void define(nb::module_& m, const char* name, const char* doc, F f, R (F::*)(A...) const, N... names) {
    static_assert(sizeof...(A) == sizeof...(N), "one name for each argument");
    m.def(
        name,
        [f](Pool& pool, A... arguments) {
            nb::gil_scoped_release release;
            PoolScope scope(pool);
            return f(arguments...);
        },
        nb::arg("pool"), nb::arg(names)..., doc);
    if constexpr (QUEUED)
        m.def((std::string("queue_") + name).c_str(),
              [f](CallList& list, A... arguments) {
                  list.calls.push_back([f, given = std::tuple<A...>(arguments...)] { std::apply(f, given); });
              },
              nb::arg("call_list"), nb::arg(names)...,
              (std::string("Append a call of `") + name + "` to call_list; nothing is computed yet.").c_str());
}
template <class F, class... N> void op(nb::module_& m, const char* name, const char* doc, F f, N... names) {
    define<true>(m, name, doc, f, &F::operator(), names...);
}
template <class F, class... N> void op_of_loading(nb::module_& m, const char* name, const char* doc, F f, N... names) {
    define<false>(m, name, doc, f, &F::operator(), names...);
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Memory bandwidth of all threads together, in bytes per second: the best of five reads of `bytes` bytes.
double read_bandwidth(Pool& pool, size_t bytes) {
    PoolScope scope(pool);
    constexpr size_t BLOCK = 1 << 17;
    Packed buffer(Kind::fp8, 1, (int)(bytes / BLOCK), (int)BLOCK, 1, 32, false);
    const uint8_t* data = buffer.panel(0, 0);
    const long blocks = (long)(bytes / BLOCK);
    parallel(blocks, [&](long i) { std::memset(const_cast<uint8_t*>(data) + i * BLOCK, 1, BLOCK); });
    double best = 0;
    for (int round = 0; round < 5; round++) {
        double begin = seconds();
        parallel(blocks, [&](long i) {
            if (kernels().read((const char*)data + i * BLOCK, BLOCK) == 0) throw std::logic_error("not what was written");
        });
        double rate = (double)(blocks * BLOCK) / (seconds() - begin);
        best = rate > best ? rate : best;
    }
    return best;
}

// Peak arithmetic throughput of all threads together, in multiplications and additions per second, measured with dot products
// of registers. kind: "bfloat16" or "int8".
double arithmetic(Pool& pool, const std::string& kind) {
    PoolScope scope(pool);
    auto peak_flops = kind_named(kind) == Kind::bf16 ? kernels().peak_flops_bf16 : kernels().peak_flops_int8;
    double best = 0, work = 0;
    for (int round = 0; round < 5; round++) {
        double begin = seconds();
        parallel(threads() * 16L, [&](long i) {
            double done = peak_flops(20000);
            if (i == 0) work = done;
        });
        double rate = work * threads() * 16 / (seconds() - begin);
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of glimmer. Pointers are passed as integers, sizes are in elements unless documented as bytes.";
    nb::set_leak_warnings(false);  // an engine that a thread or a traceback still holds at exit is no leak
    nb::exception<UnreadError>(m, "UnreadError", PyExc_OSError);
    using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Pool>(m, "Pool", "Threads that compute together; operations that are given the same pool run one at a time.")
        .def(nb::init<int>(), "threads"_a, "A pool of so many threads, the caller included. Raises ValueError below 1.")
        .def_ro("threads", &Pool::threads, "The number of threads that compute, the caller included.");
    m.def("available", &available,
          "The instruction sets that this build and this CPU support, best last, separated by spaces.");
    m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
    m.def("read_bandwidth", &read_bandwidth, "pool"_a, "nbytes"_a, ReleaseGil(),
          "Measure the memory bandwidth of all threads, in bytes per second, over a buffer of nbytes.");
    m.def("arithmetic", &arithmetic, "pool"_a, "kind"_a, ReleaseGil(),
          "Measure the peak arithmetic throughput of all threads for \"bfloat16\" or \"int8\", in operations per second.");
    m.def(
        "select", [](const std::string& name) { select(name.c_str()); }, "name"_a,
        "Use the kernels of the instruction set `name`, one of available(). Raises ValueError for another.");

    nb::class_<BufferPool>(m, "BufferPool",
                           "Memory for the results of a step, which is reused after the tensor that holds it is freed.")
        .def(nb::init<size_t>(), "max_unused_bytes"_a, "A pool that keeps at most max_unused_bytes of unused memory.")
        .def(
            "acquire",
            [](std::shared_ptr<BufferPool> pool, size_t nbytes) {
                std::unique_ptr<Arena> arena = pool->acquire(nbytes);
                Lease* lease = new Lease{std::move(pool), std::move(arena)};
                nb::capsule owner(lease, [](void* p) noexcept { delete (Lease*)p; });
                return nb::ndarray<nb::pytorch, uint8_t>(lease->arena->base, {nbytes}, owner);
            },
            "nbytes"_a, "A torch tensor of nbytes bytes (uint8), its content undefined.");

    nb::class_<MappedFile>(m, "MappedFile", "A file of weights, mapped read-only; all processes share its pages.")
        .def(nb::init<int, size_t>(), "descriptor"_a, "nbytes"_a, "Map the first nbytes bytes. Raises RuntimeError.")
        .def_ro("nbytes", &MappedFile::bytes, "Bytes that are mapped.")
        .def_prop_ro("damaged", &MappedFile::damaged,
                     "Whether the file has shrunk, or could not be read, since: all of it reads as zeros then.")
        .def(
            "tensor",
            [](std::shared_ptr<MappedFile> file, size_t begin, size_t nbytes) {
                if (begin > file->bytes || nbytes > file->bytes - begin) throw std::invalid_argument("beyond the file's end");
                uint8_t* data = const_cast<uint8_t*>(file->begin()) + begin;
                nb::capsule owner(new std::shared_ptr<MappedFile>(std::move(file)),
                                  [](void* p) noexcept { delete (std::shared_ptr<MappedFile>*)p; });
                return nb::ndarray<nb::pytorch, uint8_t>(data, {nbytes}, owner);
            },
            "begin"_a, "nbytes"_a, "Bytes of the file as a torch tensor (uint8), which must not be written.");
    m.def(
        "checksum", [](uintptr_t data, size_t nbytes) { return checksum(at<void>(data), nbytes); }, "data"_a, "nbytes"_a,
        ReleaseGil(), "The checksum of a record of a packed file: CRC-32C of its four quarters, 32 hexadecimal digits.");
    m.def(
        "checksums",
        [](Pool& pool, const std::vector<uintptr_t>& records, const std::vector<size_t>& nbytes) {
            if (records.size() != nbytes.size()) throw std::invalid_argument("a size for each record");
            std::vector<std::string> sums(records.size());
            PoolScope scope(pool);
            parallel((long)records.size(), [&](long i) {
                populate(at<void>(records[i]), nbytes[i]);
                sums[i] = checksum(at<void>(records[i]), nbytes[i]);
            });
            return sums;
        },
        "pool"_a, "records"_a, "nbytes"_a, ReleaseGil(), "The checksums of records at these addresses, by all threads.");

    using CachePart = std::tuple<uintptr_t, size_t, long>;  // of a cache: address, bytes of a block, number of blocks
    auto parts = [](const std::vector<CachePart>& described) {
        std::vector<Blocks> found;
        for (auto [begin, bytes, count] : described) found.push_back({at<char>(begin), bytes, count});
        return found;
    };
    m.def(
        "export_blocks",
        [=](const std::vector<CachePart>& cache, const std::vector<long>& blocks, uintptr_t data) {
            export_blocks(parts(cache), blocks, at<char>(data));
        },
        "parts"_a, "blocks"_a, "data"_a, ReleaseGil(),
        "Copy blocks of a cache to `data`, block after block. parts: address, bytes of a block and number of blocks of the\n"
        "keys and of the values of each layer. Raises IndexError for a block that does not exist.");
    m.def(
        "import_blocks",
        [=](const std::vector<CachePart>& cache, const std::vector<long>& blocks, uintptr_t data) {
            import_blocks(parts(cache), blocks, at<char>(data));
        },
        "parts"_a, "blocks"_a, "data"_a, ReleaseGil(),
        "The reverse: fill blocks of a cache with what export_blocks has copied.");

    nb::class_<Packed>(m, "Packed", "Weight matrices of one shape, stored in the layout that the kernels read.")
        .def(
            "__init__",
            [](Packed* self, Pool& pool, const std::string& kind, long count, int n, int k, int parts, int group_size,
               bool wide_scales, bool owns) {
                PoolScope scope(pool);
                new (self) Packed(kind_named(kind), count, n, k, parts, group_size, wide_scales, owns);
            },
            "pool"_a, "kind"_a, "count"_a, "n"_a, "k"_a, "parts"_a, "group_size"_a, "wide_scales"_a, "owns"_a = true,
            "Allocate `count` matrices (n, k) of zeros, each of `parts` equal parts; fill them with fill(). Unless `owns`,\n"
            "nothing is allocated, and place() says where each matrix lies.")
        .def_prop_ro(
            "stored_kind", [](const Packed& p) { return KINDS[(int)p.kind].name; }, "The kind, as the constructor takes it.")
        .def_prop_ro(
            "group_size", [](const Packed& p) { return p.groups.size; }, "Columns that share a scale, if the kind is int4.")
        .def_prop_ro(
            "wide_scales", [](const Packed& p) { return p.groups.wide_scales; }, "Whether scales of int4 have 32 bits.")
        .def_prop_ro("matrix_bytes", &Packed::matrix_bytes, "Bytes of one matrix without the scales of its columns.")
        .def_prop_ro("scales_bytes", &Packed::scales_bytes, "Bytes of the scales of one matrix's columns; 0: there are none.")
        .def(
            "place",
            [](Packed& p, long e, std::shared_ptr<MappedFile> file, size_t panels, size_t scales) {
                auto inside = [&](size_t begin, size_t n) {
                    return begin % 64 == 0 && begin <= file->bytes && n <= file->bytes - begin;
                };
                if (!inside(panels, p.matrix_bytes()) || !inside(scales, p.scales_bytes()))
                    throw std::invalid_argument("a matrix that does not lie in the file");
                p.place(e, file->begin() + panels, file->begin() + scales, file);
            },
            "e"_a, "file"_a, "panels"_a, "scales"_a,
            "Use as matrix e what lies at these bytes of a file, multiples of 64. The file stays mapped as long.")
        .def(
            "copy_matrix",
            [](const Packed& p, long e, uintptr_t panels, uintptr_t scales) {
                if (e < 0 || e >= p.count) throw std::invalid_argument("no matrix of this number");
                std::memcpy(at<void>(panels), p.panel(e, 0), p.matrix_bytes());
                if (p.scales_bytes()) std::memcpy(at<void>(scales), p.panel_scales(e, 0), p.scales_bytes());
            },
            "e"_a, "panels"_a, "scales"_a, ReleaseGil(), "Copy matrix e to these addresses, as place() takes it.")
        .def_prop_ro(
            "kind",
            [](const Packed& p) {
                return p.kind == Kind::fp8 ? "fp8" : p.kind == Kind::int8 ? "int8" : p.kind == Kind::int4 ? "int4" : "plain";
            },
            "\"fp8\", \"int8\", \"int4\", or \"plain\" for weights without scales.")
        .def_prop_ro(
            "float32", [](const Packed& p) { return is_float32(p.kind); }, "Whether the products are computed in float32.")
        .def_ro("count", &Packed::count, "Number of matrices.")
        .def_ro("n", &Packed::n, "Rows of a matrix: output features.")
        .def_ro("k", &Packed::k, "Columns of a matrix: input features.")
        .def_ro("parts", &Packed::parts, "Equal parts of a matrix: 2 for gate and up together, else 1.")
        .def_prop_ro("nbytes", &Packed::bytes, "Bytes of memory in use.")
        .def(
            "fill",
            [](Packed& p, Pool& pool, long e, int first, int rows, uintptr_t codes, size_t stride, uintptr_t scales,
               uintptr_t zero_points) {
                PoolScope scope(pool);
                p.fill(e, first, rows, at<void>(codes), stride, at<float>(scales), at<uint8_t>(zero_points));
            },
            "pool"_a, "e"_a, "first"_a, "rows"_a, "codes"_a, "stride"_a, "scales"_a, "zero_points"_a, ReleaseGil(),
            "Pack rows first..first+rows of matrix e. stride: bytes from one row of codes to the next.");

    nb::class_<ExpertStore>(m, "ExpertStore",
                            "Slots in memory for some of the experts of a packed file; the others are read when chosen.")
        .def(nb::init<int, long, size_t, int, double>(), "descriptor"_a, "slots"_a, "slot_bytes"_a, "readers"_a, "half_life"_a,
             "Slots of slot_bytes each, and threads that read. half_life: tokens after which a choice counts half.")
        .def(
            "add_layer",
            [](ExpertStore& store, std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, size_t begin,
               const std::vector<size_t>& layout, const std::vector<std::string>& checksums) {
                if (layout.size() != 5) throw std::invalid_argument("five numbers describe a record");
                return store.add_layer(std::move(gate_up), std::move(down), begin,
                                       {layout[0], layout[1], layout[2], layout[3], layout[4]}, checksums);
            },
            "gate_up"_a, "down"_a, "begin"_a, "layout"_a, "checksums"_a,
            "One more layer; returns its number. layout: where in a record the panels and scales of gate_up and of down are,\n"
            "and the bytes of a record.")
        .def("resize", &ExpertStore::resize, "slots"_a, ReleaseGil(), "Use so many slots; memory of the others is given back.")
        .def("warm", &ExpertStore::warm, ReleaseGil(), "Begin to read the most frequent experts into empty slots.")
        .def("frequencies", &ExpertStore::frequencies, "layer"_a, "How often each expert was chosen lately, 0 to 1.")
        .def("set_frequencies", &ExpertStore::set_frequencies, "layer"_a, "values"_a, "What an earlier run has counted.")
        .def_ro("slots", &ExpertStore::slots, "Slots that there were at first.")
        .def_ro("slot_bytes", &ExpertStore::slot_bytes, "Bytes of a slot.")
        .def_prop_ro("slots_in_use", &ExpertStore::slots_in_use, "Slots that there are now.")
        .def_prop_ro("num_layers", &ExpertStore::num_layers, "Layers that were added.")
        .def_prop_ro("direct", &ExpertStore::direct, "Whether the file system reads without the page cache.")
        .def_prop_ro(
            "counts",
            [](const ExpertStore& store) {
                return std::make_tuple(store.chosen.load(), store.missed.load(), store.bytes_read.load());
            },
            "Experts that steps have wanted, those of them that had to be read, and bytes that were read.");

    nb::class_<CallList>(m, "CallList", "A list of calls of ops, which runs any number of times without Python.")
        .def(nb::init<>(), "An empty list.")
        .def(
            "__call__",
            [](const CallList& list, Pool& pool) {
                PoolScope scope(pool);
                for (auto& call : list.calls) call();
            },
            "pool"_a, ReleaseGil(), "Run the calls in order.");

    op(
        m, "linear", "y = x @ w.T + bias; bias may be 0.",
        [](uintptr_t x, bool x_bf16, long rows, const Packed& w, uintptr_t bias, uintptr_t y, bool y_bf16) {
            linear({at<void>(x), x_bf16}, rows, w, at<float>(bias), {at<void>(y), y_bf16});
        },
        "x", "x_bf16", "rows", "w", "bias", "y", "y_bf16");
    op(
        m, "experts", "y = the sum of the chosen experts' outputs, weighted by scores.",
        [](uintptr_t x, bool x_bf16, long rows, uintptr_t ids, uintptr_t scores, int top_k, const Packed& gate_up,
           const Packed& down, uintptr_t y) {
            experts({at<void>(x), x_bf16}, rows, at<int64_t>(ids), at<float>(scores), top_k, gate_up, down, at<float>(y));
        },
        "x", "x_bf16", "rows", "ids", "scores", "top_k", "gate_up", "down", "y");
    op(
        m, "stored_experts", "The same as experts for a layer of a store. Raises UnreadError, an OSError.",
        [](uintptr_t x, bool x_bf16, long rows, uintptr_t ids, uintptr_t scores, int top_k, ExpertStore& store, int layer,
           uintptr_t y) {
            stored_experts({at<void>(x), x_bf16}, rows, at<int64_t>(ids), at<float>(scores), top_k, store, layer, at<float>(y));
        },
        "x", "x_bf16", "rows", "ids", "scores", "top_k", "store", "layer", "y");
    op(
        m, "fetch_experts", "Begin to read what stored_experts will want.",
        [](uintptr_t ids, long count, ExpertStore& store, int layer) { fetch_experts(at<int64_t>(ids), count, store, layer); },
        "ids", "count", "store", "layer");

    op(
        m, "embed", "y = rows of the embedding table; zeros for tokens outside first..first+rows.",
        [](uintptr_t tokens, long count, uintptr_t table, bool is_bf16, long rows, long n, long first, uintptr_t y) {
            embed(at<int64_t>(tokens), count, {at<void>(table), is_bf16}, rows, n, first, {at<void>(y), is_bf16});
        },
        "tokens", "count", "table", "is_bf16", "rows", "n", "first", "y");
    op(
        m, "rms_norm", "y = the RMS norm of each head of x.",
        [](uintptr_t x, bool x_bf16, long rows, long heads, long n, long stride, uintptr_t weight, bool y_bf16, float eps,
           uintptr_t y) {
            rms_norm({at<void>(x), x_bf16}, rows, heads, n, stride, {at<void>(weight), y_bf16}, eps, {at<void>(y), y_bf16});
        },
        "x", "x_bf16", "rows", "heads", "n", "stride", "weight", "y_bf16", "eps", "y");
    op(
        m, "add_rms_norm", "total = residual + x; y = the RMS norm of total.",
        [](uintptr_t x, bool x_bf16, uintptr_t residual, bool residual_bf16, long rows, long n, uintptr_t weight, bool y_bf16,
           float eps, uintptr_t total, uintptr_t y) {
            add_rms_norm({at<void>(x), x_bf16}, {at<void>(residual), residual_bf16}, rows, n, {at<void>(weight), y_bf16}, eps,
                         {at<void>(total), residual_bf16}, {at<void>(y), y_bf16});
        },
        "x", "x_bf16", "residual", "residual_bf16", "rows", "n", "weight", "y_bf16", "eps", "total", "y");
    op(
        m, "add", "y += x.",
        [](uintptr_t y, bool y_bf16, uintptr_t x, bool x_bf16, long rows, long n) {
            add({at<void>(y), y_bf16}, {at<void>(x), x_bf16}, rows, n);
        },
        "y", "y_bf16", "x", "x_bf16", "rows", "n");
    op(
        m, "swiglu", "y (rows, n) = silu(gate) * up of x (rows, 2n).",
        [](uintptr_t x, bool is_bf16, long rows, long n, uintptr_t y) {
            swiglu({at<void>(x), is_bf16}, rows, n, {at<void>(y), is_bf16});
        },
        "x", "is_bf16", "rows", "n", "y");
    op(
        m, "rope", "Rotary position embedding of the heads of q and k, in place.",
        [](uintptr_t q, long q_heads, long q_stride, uintptr_t k, long k_heads, long k_stride, bool is_bf16, long rows,
           long width, uintptr_t cos, uintptr_t sin, long half) {
            rope({{at<void>(q), is_bf16}, q_heads, q_stride}, {{at<void>(k), is_bf16}, k_heads, k_stride}, rows, width,
                 at<float>(cos), at<float>(sin), half);
        },
        "q", "q_heads", "q_stride", "k", "k_heads", "k_stride", "is_bf16", "rows", "width", "cos", "sin", "half");
    op(
        m, "route", "ids and scores (rows, top_k) of the experts that the router chooses for each row.",
        [](uintptr_t logits, uintptr_t bias, long rows, long experts, int top_k, int n_group, int topk_group, bool normed,
           float factor, uintptr_t ids, uintptr_t scores) {
            route(at<float>(logits), at<float>(bias), rows, experts, {top_k, n_group, topk_group, normed, factor},
                  at<int64_t>(ids), at<float>(scores));
        },
        "logits", "bias", "rows", "experts", "top_k", "n_group", "topk_group", "normed", "factor", "ids", "scores");
    op_of_loading(
        m, "quantize_int4", "Quantise x (rows, inner) to int4 codes with a scale and a zero point for each group.",
        [](uintptr_t x, bool is_bf16, long stride, long rows, long inner, long group_size, uintptr_t codes, uintptr_t scales,
           uintptr_t zero_points) {
            quantize_int4({at<void>(x), is_bf16}, stride, rows, inner, group_size, at<uint8_t>(codes), at<float>(scales),
                          at<uint8_t>(zero_points));
        },
        "x", "is_bf16", "stride", "rows", "inner", "group_size", "codes", "scales", "zero_points");
    op_of_loading(
        m, "quantize_int8", "Quantise x (rows, inner) to int8 codes with a scale for each row.",
        [](uintptr_t x, bool is_bf16, long stride, long rows, long inner, uintptr_t codes, uintptr_t scales) {
            quantize_int8({at<void>(x), is_bf16}, stride, rows, inner, at<int8_t>(codes), at<float>(scales));
        },
        "x", "is_bf16", "stride", "rows", "inner", "codes", "scales");
    op_of_loading(
        m, "pread", "Read bytes of an open file with all threads: how many there are before its end, or -errno.",
        [](int descriptor, int64_t offset, size_t nbytes, uintptr_t memory) {
            return pread_all(descriptor, at<char>(memory), nbytes, offset);
        },
        "descriptor", "offset", "nbytes", "memory");
    op(
        m, "forbid", "x (rows, n) = -infinity where the bit of `allowed` (rows, bytes) is not set.",
        [](uintptr_t x, long stride, long rows, long n, uintptr_t allowed, long bytes) {
            forbid(at<float>(x), stride, rows, n, at<uint8_t>(allowed), bytes);
        },
        "x", "stride", "rows", "n", "allowed", "bytes");
    op(
        m, "argmax", "tokens (rows) = the first of the largest of each row of x (rows, n).",
        [](uintptr_t x, bool is_bf16, long stride, long rows, long n, uintptr_t tokens) {
            argmax({at<void>(x), is_bf16}, stride, rows, n, at<int64_t>(tokens));
        },
        "x", "is_bf16", "stride", "rows", "n", "tokens");
    op(
        m, "concat", "z (rows, n + m), in bytes, of x (rows, n) and y (rows, m).",
        [](uintptr_t x, long n, uintptr_t y, long m, long rows, uintptr_t z) {
            concat(at<char>(x), n, at<char>(y), m, rows, at<char>(z));
        },
        "x", "n", "y", "m", "rows", "z");
    op(
        m, "store_kv", "Write keys and values of new tokens into their slots of the paged cache.",
        [](uintptr_t k, long k_stride, uintptr_t v, long v_stride, bool is_bf16, long rows, uintptr_t slot_mapping,
           uintptr_t keys, uintptr_t values, bool codes, long blocks, int block_size, int heads, int width) {
            store_kv({at<void>(k), is_bf16}, k_stride, {at<void>(v), is_bf16}, v_stride, at<int64_t>(slot_mapping), rows,
                     {at<char>(keys), at<char>(values), is_bf16, codes, blocks, block_size, heads, width});
        },
        "k", "k_stride", "v", "v_stride", "is_bf16", "rows", "slot_mapping", "keys", "values", "codes", "blocks", "block_size",
        "heads", "width");
    op(
        m, "attention", "y = causal attention of the rows of q over the keys and values of their sequences in the paged cache.",
        [](uintptr_t q, long stride, int q_heads, bool is_bf16, uintptr_t keys, uintptr_t values, bool codes, long blocks,
           int block_size, int heads, int width, uintptr_t block_tables, long columns, uintptr_t query_start_loc,
           uintptr_t seq_lens, long sequences, float scale, uintptr_t y) {
            attention({at<void>(q), is_bf16}, stride, q_heads,
                      {at<char>(keys), at<char>(values), is_bf16, codes, blocks, block_size, heads, width},
                      at<int64_t>(block_tables), columns, at<int64_t>(query_start_loc), at<int64_t>(seq_lens), sequences, scale,
                      {at<void>(y), is_bf16});
        },
        "q", "stride", "q_heads", "is_bf16", "keys", "values", "codes", "blocks", "block_size", "heads", "width",
        "block_tables", "columns", "query_start_loc", "seq_lens", "sequences", "scale", "y");
}
