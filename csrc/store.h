// Experts that do not fit into memory: slots hold some of them, the others are read from the packed file when a token has
// chosen them. Not here: arithmetic (linear.cpp), how much memory the slots get (model/packed.py).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mapped.h"
#include "memory.h"
#include "packed.h"

namespace glimmer {

// An expert cannot be read, or is not what was written.
struct UnreadError : std::runtime_error { using std::runtime_error::runtime_error; };

// The experts of all layers, each a record of the packed file. Threads read records in quarters, several at once and without
// the page cache, and compare each quarter's checksum. When a slot is wanted, the expert whose frequency is the lowest loses
// its own: tokens that have chosen it, each counting half after `half_life` later tokens of its layer.
class ExpertStore {
public:
    // descriptor: of the packed file; may be closed afterwards. Throws std::system_error, std::bad_alloc.
    ExpertStore(int descriptor, long slots, size_t slot_bytes, int readers, double half_life);
    ~ExpertStore();
    ExpertStore(const ExpertStore&) = delete;
    ExpertStore& operator=(const ExpertStore&) = delete;

    struct Layout { size_t gate_up, gate_up_scales, down, down_scales, bytes; };  // of a record

    // One more layer, whose experts lie from `begin` on; returns its number. gate_up and down own no memory.
    int add_layer(std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, size_t begin, Layout layout,
                  const std::vector<std::string>& checksums);
    const Packed& gate_up(int layer) const { return *layers[layer].gate_up; }
    const Packed& down(int layer) const { return *layers[layer].down; }
    int num_layers() const { return (int)layers.size(); }

    // Experts of a layer that are kept in their slots until the end; reads of those that are not there have begun.
    class Hold {
    public:
        Hold() = default;
        Hold(Hold&& other) noexcept { *this = std::move(other); }
        Hold& operator=(Hold&& other) noexcept {
            release();
            store = std::exchange(other.store, nullptr), layer = other.layer;
            experts = std::move(other.experts), pending = std::move(other.pending);
            return *this;
        }
        ~Hold() { release(); }
        explicit operator bool() const { return store != nullptr; }
        // Of the experts that have not been returned yet, those that are there; waits until there is at least one, and
        // returns none when all have been returned. Throws UnreadError.
        std::vector<long> arrived();
        void release();

    private:
        friend class ExpertStore;
        ExpertStore* store = nullptr;
        int layer = 0;
        std::vector<long> experts, pending;
    };
    // An empty Hold if there are too few slots that nobody holds. With `wait` it waits for slots into which something is read.
    Hold hold(int layer, const std::vector<long>& experts, bool wait);
    // How many experts may be held at once, if another such number is held meanwhile.
    long half() const { return enabled.load() / 2; }
    bool present(int layer, long e);  // in a slot, or being read
    // Begins to read those that are not there, as far as there are slots.
    void fetch(int layer, const std::vector<long>& experts);
    // Counts: tokens[i] tokens of a step's `rows` have chosen experts[i].
    void count(int layer, const std::vector<long>& experts, const std::vector<long>& tokens, long rows);

    // Use so many slots, at most those that there were at first. The memory of the others is given back.
    void resize(long slots);
    // Reads the most frequent experts into slots that are empty, when nothing else is to be read.
    void warm();
    std::vector<double> frequencies(int layer);  // relative to the most frequent expert of all layers
    void set_frequencies(int layer, const std::vector<double>& values);

    const long slots;
    const size_t slot_bytes;
    bool direct() const { return is_direct; }
    long slots_in_use() const { return enabled.load(); }
    std::atomic<long> chosen{0}, missed{0}, bytes_read{0};  // experts of all steps, those that had to be read, and their bytes

private:
    enum class State : uint8_t { absent, reading, ready, failed };
    struct Record {
        size_t begin = 0;
        uint32_t sums[QUARTERS] = {};
        double frequency = 0;  // tokens that have chosen it, those of long ago less
        long slot = -1;
        int held = 0, left = 0;  // holders; quarters that are still to come
        bool bad = false;        // whether one of them has failed
        State state = State::absent;
    };
    struct Layer {
        std::shared_ptr<Packed> gate_up, down;
        Layout layout;
        std::vector<Record> records;
    };
    struct Read {
        Record* record;
        size_t bytes;
        int quarter;
    };
    struct Slot {
        Record* record = nullptr;
        bool enabled = true;
    };

    uint8_t* address(long slot) const { return (uint8_t*)arena.base + slot * slot_bytes; }
    long free_slot(double below);
    bool start(Layer& layer, Record& record, std::deque<Read>& queue, double below);
    void drop(Record& record);
    bool take_back();
    void hasten(Record& record);
    void read_all();
    std::string read(const Read& read);  // what went wrong, or ""

    Arena arena;
    int file = -1;
    bool is_direct = false;
    const double decay;        // of a frequency with each token of its layer
    std::deque<Layer> layers;  // addresses of records stay
    std::vector<Slot> table;
    std::atomic<long> enabled;
    std::mutex mutex;
    std::condition_variable work, arrival;
    std::deque<Read> wanted, ahead;
    long reading = 0;  // records that are being read
    std::string failure;
    bool stopping = false;
    std::vector<std::thread> threads;
};

}  // namespace glimmer
