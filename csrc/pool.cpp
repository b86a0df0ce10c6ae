// Workers spin for 3 ms after each region, since the next region of the same step follows within microseconds, and then sleep:
// waking a sleeping thread costs tens of microseconds, and an idle engine must use no CPU. A worker that the operating system
// has not scheduled in time misses a region, and nobody waits for it. One that loses its CPU within a task holds up the region
// for a time slice or more: beside other busy programs the caller computes alone for a while, and then tries again.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
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

using Clock = std::chrono::steady_clock;

constexpr auto SPIN = std::chrono::microseconds(3000);  // the longest gap between two regions of one step
constexpr int SPINS_BEFORE_YIELD = 1 << 14;             // of a caller that waits for a worker, which may lack a CPU
constexpr int SLOTS = 3;

// Memory that only grows, its content lost when it does.
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

// When the caller computes without its workers, because the system gives them no CPU: after it has waited for one of them, or
// after a while in which they have hardly taken part, for a multiple of that time; and for twice as long as before if they
// have been let in for less time than they had been kept out.
struct Backoff {
    static constexpr auto LATE = std::chrono::microseconds(1000);    // less than a time slice, more than the rest of a task
    static constexpr auto WINDOW = std::chrono::microseconds(2000);  // many times what waking a worker takes
    static constexpr Clock::duration LONGEST = std::chrono::seconds(1);
    static constexpr int MULTIPLE = 4, REGIONS = 8;  // a window has at least so many regions
    Clock::time_point until{};                       // alone until then
    Clock::duration length{0};
    Clock::time_point window{};  // the window's begin
    int opened = 0, helped = 0;  // regions of the window, and those in which a worker took part

    bool alone(Clock::time_point now) const { return now < until; }

    // The caller has computed from `begin` to `end`, with or without a worker's help, and waited for workers until `now`.
    void after(Clock::time_point begin, Clock::time_point end, Clock::time_point now, bool help) {
        if (opened++ == 0) window = begin;
        helped += help;
        if (now - end > LATE && now - end > end - begin) {  // a task may be as long as all that the caller did
            keep_out(now, now - end);
        } else if (opened >= REGIONS && now - window > WINDOW) {
            if (4 * helped < opened) keep_out(now, now - window);
            opened = helped = 0;
        }
    }

    void keep_out(Clock::time_point now, Clock::duration lost) {
        const auto again = now - lost - until < length ? 2 * length : Clock::duration(0);
        length = std::min(std::max(MULTIPLE * lost, again), LONGEST);
        until = now + length;
        opened = helped = 0;
    }
};

// How often this process is the child of a fork since the library was loaded.
std::atomic<int> forks{0};
const int registered = pthread_atfork(nullptr, nullptr, [] { forks++; });

}  // namespace

struct Pool::State {
    const int fork = forks.load();
    std::mutex scope;  // held by a PoolScope
    std::mutex mutex;  // of `wake`
    std::condition_variable wake;
    std::vector<std::thread> workers;
    // The region: its number in the upper bits, whether it is open in bit 15, how many workers are inside in the lower bits.
    // A worker enters an open region only, so that the caller, who closes it, knows for whom to wait.
    std::atomic<uint64_t> region{0};
    std::atomic<long> next{0};
    std::atomic<bool> stop{false};
    std::atomic<int> asleep{0};
    std::atomic<bool> helped{false};  // a worker has entered the region
    const std::function<void(long)>* task = nullptr;
    long n = 0;
    std::mutex failing;
    std::exception_ptr failure;
    Backoff backoff;
    Buffer buffers[SLOTS];

    static constexpr uint64_t OPEN = 1 << 15, INSIDE = OPEN - 1, NUMBER = ~(OPEN | INSIDE), STEP = OPEN << 1;

    void work() {
        const Kernels& k = kernels();
        if (k.begin_region) k.begin_region();
        try {
            for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) (*task)(i);
        } catch (...) {
            std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
            next.store(n, std::memory_order_relaxed);  // nobody begins another task
        }
        if (k.end_region) k.end_region();
    }

    // Whether the calling worker is now inside region `number`.
    bool join(uint64_t number) {
        uint64_t now = region.load(std::memory_order_acquire);
        while ((now & NUMBER) == number && now & OPEN)
            if (region.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void loop(uint64_t seen) {
        while (true) {
            auto until = Clock::now() + SPIN;
            auto unchanged = [&] { return (region.load(std::memory_order_seq_cst) & NUMBER) == seen && !stop.load(); };
            for (int round = 1; unchanged(); round++) {
                relax();
                if (round % 256 || Clock::now() < until) continue;
                std::unique_lock<std::mutex> lock(mutex);
                asleep++;
                wake.wait(lock, [&] { return !unchanged(); });
                asleep--;
            }
            if (stop.load()) return;
            seen = region.load(std::memory_order_acquire) & NUMBER;
            if (!join(seen)) continue;
            helped.store(true, std::memory_order_relaxed);
            work();
            region.fetch_sub(1, std::memory_order_release);
        }
    }

    void run(long count, const std::function<void(long)>& each, int threads) {
        task = &each;
        n = count;
        next.store(0, std::memory_order_relaxed);
        const auto begin = threads == 1 ? Clock::time_point() : Clock::now();
        if (count == 1 || threads == 1 || backoff.alone(begin)) {
            work();
        } else {
            for (int i = (int)workers.size() + 1; i < threads; i++)
                workers.emplace_back([this, now = region.load() & NUMBER] { loop(now); });
            const uint64_t number = (region.load(std::memory_order_relaxed) & NUMBER) + STEP;
            region.store(number | OPEN, std::memory_order_seq_cst);
            // Without the mutex, which a worker that has lost its CPU may hold: one that falls asleep just now misses this region,
            // for which nobody waits, and is woken by the next.
            if (asleep.load(std::memory_order_relaxed)) wake.notify_all();
            work();
            region.fetch_and(~OPEN, std::memory_order_acq_rel);
            const auto end = Clock::now();
            bool waited = false;
            for (int spins = 1; region.load(std::memory_order_acquire) & INSIDE; spins++) {
                waited = true;
                relax();
                if (spins % SPINS_BEFORE_YIELD == 0) sched_yield();
            }
            backoff.after(begin, end, waited ? Clock::now() : end, helped.exchange(false, std::memory_order_relaxed));
        }
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }

    void join() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        wake.notify_all();
        for (auto& worker : workers) worker.join();
        workers.clear();
    }
};

Pool::Pool(int threads) : threads(threads), state(std::make_unique<State>()) {
    if (threads < 1) throw std::invalid_argument("at least one thread");
    if (threads > (int)State::INSIDE) throw std::invalid_argument("more threads than a pool can count");
}

Pool::~Pool() {
    if (state->fork == forks.load()) state->join();
    else state.release();  // the threads of another process cannot be joined, and their mutexes may be locked
}

Pool::State& Pool::here() {
    if (state->fork != forks.load()) {
        state.release();
        state = std::make_unique<State>();
    }
    return *state;
}

namespace {

thread_local Pool* current = nullptr;
thread_local Pool::State* current_state = nullptr;

Pool::State& state_of_scope() {
    if (!current) throw std::logic_error("no thread pool here");
    return *current_state;
}

}  // namespace

PoolScope::PoolScope(Pool& pool) {
    if (current) throw std::logic_error("a thread pool within another");
    Pool::State& state = pool.here();
    state.scope.lock();
    current = &pool;
    current_state = &state;
}

PoolScope::~PoolScope() {
    current_state->scope.unlock();
    current = nullptr;
}

int threads() {
    state_of_scope();
    return current->threads;
}

void parallel(long n, const std::function<void(long)>& task) {
    Pool::State& state = state_of_scope();
    if (n > 0) state.run(n, task, current->threads);
}

void* scratch(int slot, size_t bytes) { return state_of_scope().buffers[slot].reserve(bytes); }

void* thread_buffer(size_t bytes) {
    thread_local Buffer buffer;
    return buffer.reserve(bytes);
}

}  // namespace glimmer
