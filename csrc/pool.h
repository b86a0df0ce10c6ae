// The extension's one thread pool. Not here: what the threads compute, and how many CPUs this process may use (device.py).
#pragma once

#include <cstddef>
#include <functional>

namespace glimmer {

// Threads that take part in a region, the caller included; 1 until told otherwise. Throws std::invalid_argument below 1.
void set_threads(int n);
int threads();

// Calls task(i) for every i in 0..n, each once, on any thread, and returns when all are done. One region runs at a time;
// a second caller waits for its turn. Tasks must not throw and must not call parallel themselves.
void parallel(long n, const std::function<void(long)>& task);

// Memory that lives until the region that asked for it is over and the next one asks: kept between calls, 64-byte
// aligned, its content undefined. slot: a small number of the caller's choice. Only between Turn's begin and end.
void* scratch(int slot, size_t bytes);

// Memory of the calling thread that lives until its task asks again, else like scratch.
void* own(size_t bytes);

// Holds the pool for one operation made of several regions, so that its scratch stays its own.
struct Turn {
    Turn();
    ~Turn();
};

}  // namespace glimmer
