#include "memory.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

namespace glimmer {
namespace {

constexpr size_t KEPT = 512 << 20;

struct Shelf {
    std::mutex mutex;
    std::vector<std::unique_ptr<Chunk>> chunks;
    size_t bytes = 0;
};

Shelf& shelf() {
    static Shelf* one = new Shelf;  // never destroyed: a tensor may outlive static destructors
    return *one;
}

}  // namespace

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

std::unique_ptr<Chunk> lend(size_t bytes) {
    Shelf& s = shelf();
    std::lock_guard<std::mutex> lock(s.mutex);
    size_t best = s.chunks.size();
    for (size_t i = 0; i < s.chunks.size(); i++) {
        const size_t size = s.chunks[i]->size;
        if (size >= bytes && size <= 2 * bytes + HUGE_PAGE && (best == s.chunks.size() || size < s.chunks[best]->size)) best = i;
    }
    if (best == s.chunks.size()) return std::make_unique<Chunk>(bytes);
    std::unique_ptr<Chunk> found = std::move(s.chunks[best]);
    s.chunks.erase(s.chunks.begin() + best);
    s.bytes -= found->size;
    return found;
}

void give_back(std::unique_ptr<Chunk> chunk) {
    Shelf& s = shelf();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.bytes += chunk->size;
    s.chunks.push_back(std::move(chunk));
    while (s.bytes > KEPT) {  // the one that nobody has wanted for longest
        s.bytes -= s.chunks.front()->size;
        s.chunks.erase(s.chunks.begin());
    }
}

}  // namespace glimmer
