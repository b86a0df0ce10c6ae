#include "store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <system_error>

namespace glimmer {
namespace {

constexpr double NO_LIMIT = std::numeric_limits<double>::infinity();

uint32_t from_hex(const std::string& digits, int quarter) {
    if (digits.size() != 8 * QUARTERS) throw std::invalid_argument("a checksum has 32 digits");
    return (uint32_t)std::stoul(digits.substr(8 * quarter, 8), nullptr, 16);
}

}  // namespace

ExpertStore::ExpertStore(int descriptor, long slots, size_t slot_bytes, int readers, double half_life)
    : slots(slots),
      slot_bytes(slot_bytes),
      arena((size_t)(slots > 0 ? slots : 1) * slot_bytes),
      decay(std::exp2(-1 / half_life)),
      table(slots > 0 ? slots : 0),
      enabled(slots) {
    if (slots < 2 || slot_bytes == 0 || slot_bytes % 4096 || readers < 1 || !(half_life > 0))
        throw std::invalid_argument("slots, their bytes, readers and half_life must be positive");
    // Another open file of the same inode: the descriptor's own flags are shared with others.
    const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
#if defined(O_DIRECT)
    file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    is_direct = file >= 0;
#endif
    if (file < 0) file = dup(descriptor);
    if (file < 0) throw std::system_error(errno, std::generic_category(), "open");
    for (int i = 0; i < readers; i++) threads.emplace_back([this] { read_all(); });
}

ExpertStore::~ExpertStore() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stopping = true;
    }
    work.notify_all();
    for (std::thread& thread : threads) thread.join();
    close(file);
}

int ExpertStore::add_layer(std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, size_t begin, Layout layout,
                           const std::vector<std::string>& checksums) {
    auto fits = [&](const Packed& w, size_t panels, size_t scales) {
        return panels % 64 == 0 && scales % 64 == 0 && panels + w.matrix_bytes() <= layout.bytes &&
               scales + w.scales_bytes() <= layout.bytes;
    };
    const bool whole = layout.bytes % 4096 == 0 && layout.bytes <= slot_bytes && begin % 4096 == 0;
    if (gate_up->count != down->count || (long)checksums.size() != down->count || !whole ||
        !fits(*gate_up, layout.gate_up, layout.gate_up_scales) || !fits(*down, layout.down, layout.down_scales))
        throw std::invalid_argument("records that do not hold these experts");
    std::vector<Record> records(checksums.size());
    for (size_t e = 0; e < records.size(); e++) {
        records[e].begin = begin + e * layout.bytes;
        for (int q = 0; q < QUARTERS; q++) records[e].sums[q] = from_hex(checksums[e], q);
    }
    std::lock_guard<std::mutex> lock(mutex);
    layers.push_back({std::move(gate_up), std::move(down), layout, std::move(records)});
    return (int)layers.size() - 1;
}

// The slot of the least frequent expert that nobody holds or reads, if it is less frequent than `below`; an empty one first.
// -1: there is none.
long ExpertStore::free_slot(double below) {
    long best = -1;
    double least = below;
    for (size_t s = 0; s < table.size(); s++) {
        if (!table[s].enabled) continue;
        const Record* record = table[s].record;
        if (record == nullptr) return (long)s;
        if (record->held || record->state == State::reading || record->frequency >= least) continue;
        best = (long)s, least = record->frequency;
    }
    return best;
}

void ExpertStore::drop(Record& record) {
    if (record.slot >= 0) table[record.slot].record = nullptr;
    record.slot = -1, record.state = State::absent;
}

// Gives up the last of the records that `warm` has queued of which no quarter has begun; what is wanted comes first.
bool ExpertStore::take_back() {
    for (size_t end = ahead.size(); end >= QUARTERS; end -= QUARTERS) {
        Record& record = *ahead[end - 1].record;
        if (record.held || ahead[end - QUARTERS].record != &record) continue;
        ahead.erase(ahead.begin() + (end - QUARTERS), ahead.begin() + end);
        drop(record);
        reading--;
        return true;
    }
    return false;
}

// What `warm` has queued is wanted now.
void ExpertStore::hasten(Record& record) {
    for (const Read& read : ahead)
        if (read.record == &record) wanted.push_back(read);
    ahead.erase(std::remove_if(ahead.begin(), ahead.end(), [&](const Read& read) { return read.record == &record; }),
                ahead.end());
}

// Gives the record a slot and queues its reads; false if there is no slot.
bool ExpertStore::start(Layer& layer, Record& record, std::deque<Read>& queue, double below) {
    long slot = free_slot(below);
    while (slot < 0 && &queue == &wanted && take_back()) slot = free_slot(below);
    if (slot < 0) return false;
    if (table[slot].record) drop(*table[slot].record);
    table[slot].record = &record;
    record.slot = slot, record.state = State::reading, record.left = QUARTERS, record.bad = false;
    reading++;
    if (&queue == &wanted) missed++;
    for (int q = 0; q < QUARTERS; q++) queue.push_back({&record, layer.layout.bytes, q});
    return true;
}

ExpertStore::Hold ExpertStore::hold(int number, const std::vector<long>& experts, bool wait) {
    Layer& layer = layers[number];
    Hold held;
    {
        std::unique_lock<std::mutex> lock(mutex);
        // First those that are there, so that they do not lose their slots to the others.
        for (long e : experts) layer.records[e].held++;
        for (long e : experts) {
            Record& record = layer.records[e];
            if (record.state == State::failed) drop(record);
            if (record.state == State::reading && !ahead.empty()) hasten(record);
            bool started = record.state != State::absent || start(layer, record, wanted, NO_LIMIT);
            while (!started && wait && reading > 0) {
                work.notify_all();
                arrival.wait(lock);
                started = start(layer, record, wanted, NO_LIMIT);
            }
            if (started) continue;
            for (long other : experts) layer.records[other].held--;
            work.notify_all();
            return held;
        }
        for (long e : experts) {
            const uint8_t* at = address(layer.records[e].slot);
            layer.gate_up->place(e, at + layer.layout.gate_up, at + layer.layout.gate_up_scales);
            layer.down->place(e, at + layer.layout.down, at + layer.layout.down_scales);
        }
    }
    work.notify_all();
    held.store = this, held.layer = number, held.experts = held.pending = experts;
    return held;
}

std::vector<long> ExpertStore::Hold::arrived() {
    std::vector<long> there;
    if (pending.empty()) return there;
    std::unique_lock<std::mutex> lock(store->mutex);
    std::vector<Record>& records = store->layers[layer].records;
    while (true) {
        std::vector<long> rest;
        for (long e : pending) {
            if (records[e].state == State::failed) throw UnreadError(store->failure);
            (records[e].state == State::ready ? there : rest).push_back(e);
        }
        if (!there.empty()) {
            pending = std::move(rest);
            return there;
        }
        store->arrival.wait(lock);
    }
}

void ExpertStore::Hold::release() {
    if (!store) return;
    std::lock_guard<std::mutex> lock(store->mutex);
    for (long e : experts) store->layers[layer].records[e].held--;
    store = nullptr;
}

bool ExpertStore::present(int layer, long e) {
    std::lock_guard<std::mutex> lock(mutex);
    const State state = layers[layer].records[e].state;
    return state == State::ready || state == State::reading;
}

void ExpertStore::fetch(int number, const std::vector<long>& experts) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        Layer& layer = layers[number];
        for (long e : experts) layer.records[e].held++;  // none of them loses its slot to another
        for (long e : experts) {
            Record& record = layer.records[e];
            if (record.state == State::absent && !start(layer, record, wanted, NO_LIMIT)) break;
        }
        for (long e : experts) layer.records[e].held--;
    }
    work.notify_all();
}

void ExpertStore::count(int number, const std::vector<long>& experts, const std::vector<long>& tokens, long rows) {
    std::lock_guard<std::mutex> lock(mutex);
    Layer& layer = layers[number];
    // A token in the middle of the step has aged by those after it; here each counts as the mean of them.
    const double aged = std::pow(decay, (double)rows), each = rows > 1 ? (1 - aged) / ((1 - decay) * (double)rows) : 1;
    for (Record& record : layer.records) record.frequency *= aged;
    chosen += (long)experts.size();
    for (size_t i = 0; i < experts.size(); i++) layer.records[experts[i]].frequency += each * (double)tokens[i];
}

void ExpertStore::resize(long count) {
    std::lock_guard<std::mutex> lock(mutex);
    count = std::max(2L, std::min(count, slots));
    while (enabled > count) {
        const long slot = free_slot(NO_LIMIT);
        if (slot < 0) return;  // all are in use just now
        if (table[slot].record) drop(*table[slot].record);
        table[slot].enabled = false;
        madvise(address(slot), slot_bytes, MADV_DONTNEED);
        enabled--;
    }
    for (Slot& slot : table)
        if (enabled < count && !slot.enabled) slot.enabled = true, enabled++;
}

void ExpertStore::warm() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        long empty = 0;
        for (const Slot& slot : table) empty += slot.enabled && slot.record == nullptr;
        std::vector<std::pair<double, std::pair<Layer*, Record*>>> absent;
        for (Layer& layer : layers)
            for (Record& record : layer.records)
                if (record.state == State::absent) absent.push_back({-record.frequency, {&layer, &record}});
        std::stable_sort(absent.begin(), absent.end(), [](auto& a, auto& b) { return a.first < b.first; });
        for (auto& [frequency, one] : absent)
            if (empty-- <= 0 || !start(*one.first, *one.second, ahead, -NO_LIMIT)) break;
    }
    work.notify_all();
}

std::vector<double> ExpertStore::frequencies(int number) {
    std::lock_guard<std::mutex> lock(mutex);
    double most = 0;
    for (const Layer& layer : layers)
        for (const Record& record : layer.records) most = std::max(most, record.frequency);
    std::vector<double> found;
    for (const Record& record : layers[number].records) found.push_back(most > 0 ? record.frequency / most : 0);
    return found;
}

void ExpertStore::set_frequencies(int number, const std::vector<double>& values) {
    std::lock_guard<std::mutex> lock(mutex);
    Layer& layer = layers[number];
    if (values.size() != layer.records.size()) throw std::invalid_argument("a frequency for each expert");
    for (size_t e = 0; e < values.size(); e++) layer.records[e].frequency = values[e];
}

void ExpertStore::read_all() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        work.wait(lock, [&] { return stopping || !wanted.empty() || !ahead.empty(); });
        if (stopping) return;
        std::deque<Read>& queue = wanted.empty() ? ahead : wanted;
        const Read next = queue.front();
        queue.pop_front();
        lock.unlock();
        const std::string fault = read(next);
        lock.lock();
        Record& record = *next.record;
        if (!fault.empty()) failure = fault, record.bad = true;
        if (--record.left > 0) continue;
        record.state = record.bad ? State::failed : State::ready;
        reading--;
        arrival.notify_all();
    }
}

std::string ExpertStore::read(const Read& next) {
    const Record& record = *next.record;
    const size_t each = quarter(next.bytes), first = next.quarter * each;
    if (first >= next.bytes) return crc32c(nullptr, 0) == record.sums[next.quarter] ? "" : "has a wrong checksum";
    const size_t bytes = next.quarter == QUARTERS - 1 ? next.bytes - first : std::min(each, next.bytes - first);
    uint8_t* const to = address(record.slot) + first;
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pread(file, to + done, bytes - done, (off_t)(record.begin + first + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return std::string("cannot be read: ") + std::strerror(errno);
        if (n == 0) return "ends before byte " + std::to_string(record.begin + next.bytes);
        done += (size_t)n;
    }
    bytes_read += (long)bytes;
    if (crc32c(to, bytes) != record.sums[next.quarter])
        return "has other bytes than were written, from byte " + std::to_string(record.begin + first) + " on";
    return "";
}

}  // namespace glimmer
