// Thread pools. Each engine has one of its own, so that engines of one process do not disturb each other. Not here: what the
// threads compute, and how many CPUs this process may use (device.py).
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace glimmer {

// `threads` threads that compute together, the caller included. Its workers are started when they are first needed. A forked
// child has none of them and starts its own.
class Pool {
public:
    // Throws std::invalid_argument below 1.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    const int threads;
    struct State;

private:
    friend struct PoolScope;
    State& here();  // the state of this process
    std::unique_ptr<State> state;
};

// Makes `pool` the pool of the calling thread's parallel regions and scratch memory until the end of the scope, and locks it:
// another thread that wants the same pool waits. Scopes are not nested.
struct PoolScope {
    explicit PoolScope(Pool& pool);
    ~PoolScope();
    PoolScope(const PoolScope&) = delete;
    PoolScope& operator=(const PoolScope&) = delete;
};

// These three use the pool of the calling thread's PoolScope, and throw std::logic_error outside of one.

// Threads of a parallel region, the caller included.
int threads();

// Calls task(i) for every i in 0..n, each once, on any thread, and returns when all are done. It waits only for workers that
// have begun one of the tasks. Throws what the first failing task has thrown. Tasks must not call parallel themselves.
void parallel(long n, const std::function<void(long)>& task);

// Shared scratch memory, one buffer for each slot: 64-byte aligned, reused between calls, its content undefined. Valid until
// the next call with the same slot. slot: 0, 1 or 2.
void* scratch(int slot, size_t bytes);

// Scratch memory of the calling thread, valid until the same thread calls again; else like scratch. Needs no PoolScope.
void* thread_buffer(size_t bytes);

}  // namespace glimmer
