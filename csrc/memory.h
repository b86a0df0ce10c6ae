// Memory in huge pages where the system gives them: walking the tables of small pages would cost a decoding step more than
// a tenth of its time. Not here: what lies in it (packed.h), and what threads keep for themselves (pool.h).
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace glimmer {

constexpr size_t HUGE_PAGE = 2 << 20;

inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Owns memory of zeros, of at least `bytes`. Throws std::bad_alloc.
struct Chunk {
    char* base;
    size_t size, used = 0;

    explicit Chunk(size_t bytes);
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;
    ~Chunk();
};

// Lends chunks for the results of a step, their content undefined. What is given back serves the next that asks: the system
// would take the pages away and clear them anew, a fortieth of a prompt's time. Any thread may lend and give back.
class Shelf {
public:
    // kept: the most bytes that lie here unused.
    explicit Shelf(size_t kept) : kept(kept) {}
    // A chunk of at least `bytes`. Throws std::bad_alloc.
    std::unique_ptr<Chunk> lend(size_t bytes);
    void give_back(std::unique_ptr<Chunk> chunk);

private:
    const size_t kept;
    std::mutex mutex;
    std::vector<std::unique_ptr<Chunk>> chunks;
    size_t unused = 0;
};

}  // namespace glimmer
