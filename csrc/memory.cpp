#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace glimmer {

Arena::Arena(size_t bytes) : size(round_up(bytes, HUGE_PAGE)) {
    const size_t mapped = size + HUGE_PAGE;
    char* all = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    base = (char*)round_up((size_t)all, HUGE_PAGE);
    if (base > all) munmap(all, base - all);
    if (base + size < all + mapped) munmap(base + size, all + mapped - base - size);
#if defined(MADV_HUGEPAGE)
    madvise(base, size, MADV_HUGEPAGE);  // only advice: without huge pages the results are the same
#endif
}

Arena::~Arena() { munmap(base, size); }

std::unique_ptr<Arena> BufferPool::acquire(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    const size_t none = arenas.size();
    size_t best = none;  // the smallest that fits, and among equals the one released first
    for (size_t i = 0; i < arenas.size(); i++) {
        const size_t size = arenas[i]->size;
        const bool fits = size >= bytes && size <= 2 * bytes + HUGE_PAGE;
        if (fits && (best == none || size < arenas[best]->size)) best = i;
    }
    if (best == none) return std::make_unique<Arena>(bytes);
    std::unique_ptr<Arena> found = std::move(arenas[best]);
    arenas.erase(arenas.begin() + best);
    unused -= found->size;
    return found;
}

void BufferPool::release(std::unique_ptr<Arena> arena) {
    std::lock_guard<std::mutex> lock(mutex);
    unused += arena->size;
    arenas.push_back(std::move(arena));
    while (unused > max_unused_bytes) {  // evict the arena that has been unused for longest
        unused -= arenas.front()->size;
        arenas.erase(arenas.begin());
    }
}

}  // namespace glimmer
