#include "files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "memory.h"
#include "pool.h"

namespace glimmer {
namespace {

constexpr size_t PIECE = 256 << 10;  // about as many bytes a thread copies at a time: a few times what starting a region takes

// As pread_all, in the calling thread.
int64_t pread_serially(int descriptor, char* memory, size_t nbytes, int64_t offset) {
    size_t done = 0;
    while (done < nbytes) {
        const ssize_t count = ::pread(descriptor, memory + done, nbytes - done, offset + (int64_t)done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return -errno;
        if (count == 0) break;
        done += (size_t)count;
    }
    return (int64_t)done;
}

}  // namespace

int64_t pread_all(int descriptor, char* memory, size_t nbytes, int64_t offset) {
    // Every thread has as many pieces as the others, and all pieces are of one size.
    const size_t pieces = round_up((nbytes + PIECE - 1) / PIECE, nbytes > PIECE ? threads() : 1);
    const size_t piece = round_up((nbytes + pieces - 1) / pieces, 4096);
    std::vector<int64_t> found((nbytes + piece - 1) / piece);
    parallel((long)found.size(), [&](long i) {
        const size_t begin = (size_t)i * piece;
        found[i] = pread_serially(descriptor, memory + begin, std::min(piece, nbytes - begin), offset + (int64_t)begin);
    });
    int64_t total = 0;
    for (size_t i = 0; i < found.size(); i++) {
        if (found[i] < 0) return found[i];
        total += found[i];
        if (found[i] < (int64_t)std::min(piece, nbytes - i * piece)) break;
    }
    return total;
}

}  // namespace glimmer
