// Workers spin for 3 ms after each region, since the next region of the same step follows within microseconds, and then sleep:
// waking a sleeping thread costs tens of microseconds, and an idle engine must use no CPU.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax() { asm volatile("yield"); }
#else
static inline void relax() {}
#endif

namespace glimmer {
namespace {

constexpr auto SPIN = std::chrono::microseconds(3000);  // the longest gap between two regions of one step
constexpr int SLOTS = 3;

// Memory that only grows; its content is lost when it grows.
struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
    void* reserve(size_t bytes) {
        if (size < bytes) {
            std::free(data);
            const size_t rounded = (bytes + bytes / 8 + 4095) / 4096 * 4096;
            data = std::aligned_alloc(4096, rounded);
            size = data ? rounded : 0;
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
};

struct Pool {
    std::recursive_mutex region_mutex;
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::atomic<unsigned long> epoch{0};
    std::atomic<long> next{0};
    std::atomic<int> busy{0};
    std::atomic<bool> stop{false};
    std::atomic<int> asleep{0};
    const std::function<void(long)>* task = nullptr;
    long n = 0;
    int wanted = 1;
    Buffer buffers[SLOTS];

    void work() {
        const Kernels& k = kernels();
        if (k.enter) k.enter();
        for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) (*task)(i);
        if (k.leave) k.leave();
    }

    void loop(unsigned long seen) {
        while (true) {
            auto until = std::chrono::steady_clock::now() + SPIN;
            for (int round = 1; epoch.load(std::memory_order_acquire) == seen && !stop.load(); round++) {
                relax();
                if (round % 256 || std::chrono::steady_clock::now() < until) continue;
                std::unique_lock<std::mutex> lock(mutex);
                asleep++;
                wake.wait(lock, [&] { return epoch.load() != seen || stop.load(); });
                asleep--;
            }
            if (stop.load()) return;
            seen = epoch.load(std::memory_order_acquire);
            work();
            busy.fetch_sub(1, std::memory_order_release);
        }
    }

    void start() {
        for (int i = (int)workers.size() + 1; i < wanted; i++) workers.emplace_back([this, e = epoch.load()] { loop(e); });
    }

    void join() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        wake.notify_all();
        for (auto& worker : workers) worker.join();
        workers.clear();
        stop = false;
    }
};

Pool* pool = new Pool;  // never destroyed: worker threads may outlive static destructors

// A forked child has no worker threads, and its mutexes are in an unknown state: it gets a new pool.
void forked() {
    int wanted = pool->wanted;
    pool = new Pool;
    pool->wanted = wanted;
}

const int registered = pthread_atfork(nullptr, nullptr, forked);

}  // namespace

void set_threads(int n) {
    if (n < 1) throw std::invalid_argument("at least one thread");
    std::lock_guard<std::recursive_mutex> region_lock(pool->region_mutex);
    if (n - 1 < (int)pool->workers.size()) pool->join();
    pool->wanted = n;
}

int threads() { return pool->wanted; }

void parallel(long n, const std::function<void(long)>& task) {
    if (n <= 0) return;
    std::lock_guard<std::recursive_mutex> region_lock(pool->region_mutex);
    Pool& p = *pool;
    p.task = &task;
    p.n = n;
    p.next.store(0, std::memory_order_relaxed);
    if (n == 1 || p.wanted == 1) return p.work();
    p.start();
    p.busy.store((int)p.workers.size(), std::memory_order_relaxed);
    {
        // The mutex is taken only if a worker sleeps: a worker about to sleep holds it, and first checks the epoch again.
        p.epoch.fetch_add(1, std::memory_order_seq_cst);
        if (p.asleep.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(p.mutex);
            p.wake.notify_all();
        }
    }
    p.work();
    while (p.busy.load(std::memory_order_acquire)) relax();
}

PoolLock::PoolLock() { pool->region_mutex.lock(); }
PoolLock::~PoolLock() { pool->region_mutex.unlock(); }

void* scratch(int slot, size_t bytes) { return pool->buffers[slot].reserve(bytes); }

void* thread_buffer(size_t bytes) {
    thread_local Buffer buffer;
    return buffer.reserve(bytes);
}

}  // namespace glimmer
