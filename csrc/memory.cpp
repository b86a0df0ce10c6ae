#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace glimmer {

Chunk::Chunk(size_t bytes) : size(round_up(bytes, HUGE_PAGE)) {
    const size_t room = size + HUGE_PAGE;
    char* all = (char*)mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    base = (char*)round_up((size_t)all, HUGE_PAGE);
    if (base > all) munmap(all, base - all);
    if (base + size < all + room) munmap(base + size, all + room - base - size);
#if defined(MADV_HUGEPAGE)
    madvise(base, size, MADV_HUGEPAGE);  // a wish: without it everything works alike
#endif
}

Chunk::~Chunk() { munmap(base, size); }

std::unique_ptr<Chunk> Shelf::lend(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    const size_t none = chunks.size();
    size_t best = none;  // the smallest that fits, and of these the one that has lain here longest
    for (size_t i = 0; i < chunks.size(); i++) {
        const size_t size = chunks[i]->size;
        const bool fits = size >= bytes && size <= 2 * bytes + HUGE_PAGE;
        if (fits && (best == none || size < chunks[best]->size)) best = i;
    }
    if (best == none) return std::make_unique<Chunk>(bytes);
    std::unique_ptr<Chunk> found = std::move(chunks[best]);
    chunks.erase(chunks.begin() + best);
    unused -= found->size;
    return found;
}

void Shelf::give_back(std::unique_ptr<Chunk> chunk) {
    std::lock_guard<std::mutex> lock(mutex);
    unused += chunk->size;
    chunks.push_back(std::move(chunk));
    while (unused > kept) {  // the one that nobody has wanted for longest
        unused -= chunks.front()->size;
        chunks.erase(chunks.begin());
    }
}

}  // namespace glimmer
