// Memory in huge pages where the system provides them: page-table walks of small pages would cost a decoding step more than a
// tenth of its time. Not here: the weights stored in it (packed.h), and the scratch memory of threads (pool.h).
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace glimmer {

constexpr size_t HUGE_PAGE = 2 << 20;

inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Owns at least `bytes` of memory, initialised to zero. Throws std::bad_alloc.
struct Arena {
    char* base;
    size_t size, used = 0;

    explicit Arena(size_t bytes);
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();
};

// Provides arenas for the results of a step, their content undefined. A released arena is reused: the system would unmap the
// pages and clear new ones, which takes a fortieth of a prompt's time. Any thread may acquire and release.
class BufferPool {
public:
    // max_unused_bytes: how many bytes of released arenas are retained at most.
    explicit BufferPool(size_t max_unused_bytes) : max_unused_bytes(max_unused_bytes) {}
    // An arena of at least `bytes`. Throws std::bad_alloc.
    std::unique_ptr<Arena> acquire(size_t bytes);
    void release(std::unique_ptr<Arena> arena);

private:
    const size_t max_unused_bytes;
    std::mutex mutex;
    std::vector<std::unique_ptr<Arena>> arenas;
    size_t unused = 0;
};

}  // namespace glimmer
