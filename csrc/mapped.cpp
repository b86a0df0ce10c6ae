#include "mapped.h"

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <system_error>

#include "memory.h"

namespace glimmer {
namespace {

// The mappings that there are, for the signal handler: it may run in any thread at any time, and so takes no lock.
constexpr int MAX_MAPPED = 64;
struct Range {
    std::atomic<uint8_t*> base{nullptr};
    std::atomic<size_t> bytes{0};
    std::atomic<bool> damaged{false};
};
Range ranges[MAX_MAPPED];
std::mutex registration;
struct sigaction previous;

void on_sigbus(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    uint8_t* const address = (uint8_t*)info->si_addr;
    for (Range& range : ranges) {
        uint8_t* const base = range.base.load();
        const size_t bytes = range.bytes.load();
        if (base == nullptr || address < base || address >= base + bytes) continue;
        range.damaged.store(true);
        if (mmap(base, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED) {
            errno = saved;
            return;  // the load is repeated, and reads zeros
        }
    }
    if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) return previous.sa_sigaction(signal, info, context);
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
    sigaction(SIGBUS, &previous, nullptr);  // not ours: the load is repeated, and ends the process as it would have
}

void handle_sigbus() {
    struct sigaction action;
    std::memset(&action, 0, sizeof action);
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    struct sigaction found;
    sigaction(SIGBUS, nullptr, &found);
    if (found.sa_flags & SA_SIGINFO && found.sa_sigaction == on_sigbus) return;
    previous = found;
    sigaction(SIGBUS, &action, nullptr);
}

}  // namespace

MappedFile::MappedFile(int descriptor, size_t bytes) : bytes(bytes), reserved(round_up(bytes, HUGE_PAGE) + HUGE_PAGE) {
    std::lock_guard<std::mutex> lock(registration);
    for (place = 0; place < MAX_MAPPED && ranges[place].base.load(); place++) {}
    if (place == MAX_MAPPED) throw std::system_error(EMFILE, std::generic_category(), "more than 64 mapped files");
    // Huge pages of the page cache are mapped as such only where address and offset agree modulo their size.
    uint8_t* const all = (uint8_t*)mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    base = (uint8_t*)round_up((size_t)all, HUGE_PAGE);
    if (base > all) munmap(all, base - all);
    reserved -= base - all;
    if (mmap(base, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) {
        const int error = errno;
        munmap(base, reserved);
        throw std::system_error(error, std::generic_category(), "mmap");
    }
#if defined(MADV_HUGEPAGE)
    madvise(base, bytes, MADV_HUGEPAGE);  // what is not in the page cache is read in huge pages; only advice
#endif
    handle_sigbus();
    ranges[place].damaged.store(false);
    ranges[place].bytes.store(bytes);
    ranges[place].base.store(base);
}

MappedFile::~MappedFile() {
    std::lock_guard<std::mutex> lock(registration);
    ranges[place].base.store(nullptr);
    munmap(base, reserved);
}

bool MappedFile::damaged() const { return ranges[place].damaged.load(); }

namespace {

using Table = std::array<std::array<uint32_t, 256>, 8>;

constexpr Table make_table() {
    Table table{};
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        table[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    return table;
}
constexpr Table TABLE = make_table();

uint32_t crc_by_table(uint32_t crc, const uint8_t* p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t eight;
        std::memcpy(&eight, p, 8);
        eight ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= TABLE[7 - k][eight >> 8 * k & 255];
    }
    for (; n; p++, n--) crc = crc >> 8 ^ TABLE[0][(crc ^ *p) & 255];
    return crc;
}

#if defined(__x86_64__)
// The processor's instruction takes eight bytes at a time and has a latency of three cycles.
__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(uint32_t start, const uint8_t* p, size_t n) {
    uint64_t crc = start;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t eight;
        std::memcpy(&eight, p, 8);
        crc = __builtin_ia32_crc32di(crc, eight);
    }
    for (; n; p++, n--) crc = __builtin_ia32_crc32qi((uint32_t)crc, *p);
    return (uint32_t)crc;
}

// Four sums at once, over equal lengths: each waits for its own last result only.
__attribute__((target("sse4.2"))) void crc_four(const uint8_t* const p[QUARTERS], size_t n, uint32_t sums[QUARTERS]) {
    uint64_t a = ~0u, b = ~0u, c = ~0u, d = ~0u;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        uint64_t w, x, y, z;
        std::memcpy(&w, p[0] + i, 8), std::memcpy(&x, p[1] + i, 8), std::memcpy(&y, p[2] + i, 8), std::memcpy(&z, p[3] + i, 8);
        a = __builtin_ia32_crc32di(a, w), b = __builtin_ia32_crc32di(b, x);
        c = __builtin_ia32_crc32di(c, y), d = __builtin_ia32_crc32di(d, z);
    }
    sums[0] = (uint32_t)a, sums[1] = (uint32_t)b, sums[2] = (uint32_t)c, sums[3] = (uint32_t)d;
}
#endif

bool has_instruction() {
#if defined(__x86_64__)
    static const bool found = __builtin_cpu_supports("sse4.2");
    return found;
#else
    return false;
#endif
}

uint32_t crc(uint32_t start, const void* data, size_t bytes) {
#if defined(__x86_64__)
    if (has_instruction()) return crc_by_instruction(start, (const uint8_t*)data, bytes);
#endif
    return crc_by_table(start, (const uint8_t*)data, bytes);
}

}  // namespace

void populate([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_POPULATE_READ)
    const size_t begin = (size_t)data / 4096 * 4096;
    madvise((void*)begin, round_up((size_t)data + bytes - begin, 4096), MADV_POPULATE_READ);
#endif
}

uint32_t crc32c(const void* data, size_t bytes) { return ~crc(~0u, data, bytes); }

std::string checksum(const void* data, size_t bytes) {
    const size_t each = quarter(bytes);
    const uint8_t* from[QUARTERS];
    size_t lengths[QUARTERS], least = bytes;
    for (int q = 0; q < QUARTERS; q++) {
        const size_t at = q * each < bytes ? q * each : bytes;
        from[q] = (const uint8_t*)data + at;
        lengths[q] = bytes - at < each || q == QUARTERS - 1 ? bytes - at : each;
        least = lengths[q] < least ? lengths[q] : least;
    }
    least -= least % 8;
    uint32_t sums[QUARTERS] = {~0u, ~0u, ~0u, ~0u};
#if defined(__x86_64__)
    if (has_instruction()) crc_four(from, least, sums);
    else
#endif
        for (int q = 0; q < QUARTERS; q++) sums[q] = crc(sums[q], from[q], least);
    char text[8 * QUARTERS + 1];
    for (int q = 0; q < QUARTERS; q++)
        std::snprintf(text + 8 * q, 9, "%08x", ~crc(sums[q], from[q] + least, lengths[q] - least));
    return text;
}

}  // namespace glimmer
