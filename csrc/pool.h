// The thread pool of the extension. Not here: what the threads compute, and how many CPUs this process may use (device.py).
#pragma once

#include <cstddef>
#include <functional>

namespace glimmer {

// Number of threads of a parallel region, the caller included; 1 by default. Throws std::invalid_argument below 1.
void set_threads(int n);
int threads();

// Calls task(i) for every i in 0..n, each once, on any thread, and returns when all are done. One region runs at a time;
// a second caller waits until the first one's region has ended. Tasks must not throw and must not call parallel themselves.
void parallel(long n, const std::function<void(long)>& task);

// Shared scratch memory, one buffer for each slot: 64-byte aligned, reused between calls, its content undefined. Valid until
// the next call with the same slot. slot: 0, 1 or 2. Call it only while a PoolLock is held.
void* scratch(int slot, size_t bytes);

// Scratch memory of the calling thread, valid until the same thread calls again; else like scratch.
void* thread_buffer(size_t bytes);

// Locks the pool for one operation of several parallel regions, so that no other operation overwrites its scratch memory.
struct PoolLock {
    PoolLock();
    ~PoolLock();
};

}  // namespace glimmer
