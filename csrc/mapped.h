// A file of weights, mapped read-only: its pages are those of the page cache, shared by all processes that map it. And the
// checksum of its records. Not here: what the file holds (packed.h), and reading without the page cache (store.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace glimmer {

// The first `bytes` bytes of a file, mapped at an address that allows huge pages. Where the file has shrunk since, or a page
// cannot be read, the process is not ended by SIGBUS: the whole mapping becomes zeros, and `damaged` says so. Whoever computes
// with the weights looks at it before a result is used.
class MappedFile {
public:
    // descriptor: may be closed afterwards. Throws std::system_error.
    MappedFile(int descriptor, size_t bytes);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    const size_t bytes;
    const uint8_t* begin() const { return base; }
    bool damaged() const;

private:
    uint8_t* base;
    size_t reserved;  // bytes of addresses, a little more than `bytes`
    int place;        // in the table that the signal handler reads
};

// The checksum of a record is the CRC-32C of each of its four quarters (the first three of `quarter` bytes), as 32 hexadecimal
// digits: four sums are as fast as memory, and a quarter can be checked as soon as it is there.
constexpr int QUARTERS = 4;
inline size_t quarter(size_t bytes) { return (bytes / QUARTERS + 4095) / 4096 * 4096; }
uint32_t crc32c(const void* data, size_t bytes);
std::string checksum(const void* data, size_t bytes);
// Maps all pages of a record at once, and reads those that are not in the page cache: one by one that takes several times as
// long. Only advice.
void populate(const void* data, size_t bytes);

}  // namespace glimmer
