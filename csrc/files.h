// Reading files with all threads of a pool. Not here: which bytes of which file, and whether it has changed meanwhile
// (checkpoint/files.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace glimmer {

// Reads bytes offset..offset+nbytes of an open file into memory. Returns how many there are before the end of the file, or
// -errno. Several threads may use one descriptor.
int64_t pread_all(int descriptor, char* memory, size_t nbytes, int64_t offset);

}  // namespace glimmer
