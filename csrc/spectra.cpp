// Transforms, and a cache of the filters' spectra; its key is the values of the filters.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "linear.h"

namespace deepthin {
namespace {

// The radices of `points`, or none if it has other factors. Measured: a 4 first and an 8 last make the fastest passes.
std::vector<int> radices(int64_t points) {
    int twos = 0;
    for (; points % 2 == 0; points /= 2) twos++;
    const int last = twos % 2 == 0 ? 0 : twos == 1 ? 2 : 8;
    int fours = (twos - (last == 8 ? 3 : last / 2)) / 2;
    std::vector<int> result;
    if (fours > 0) result.push_back(4), fours--;
    for (int radix : {5, 3})
        for (; points % radix == 0; points /= radix) result.push_back(radix);
    if (points > 1) return {};
    result.insert(result.end(), fours, 4);
    if (last) result.push_back(last);
    return result;
}

// At least `least` points, fast to transform.
int64_t transform_length(int64_t least) {
    int64_t best = 0;
    double best_cost = 0;
    for (int64_t points = std::max<int64_t>(least, 2); points <= 2 * std::max<int64_t>(least, 2); points++) {
        const auto result = radices(points);
        if (result.empty()) continue;
        double cost = 2;  // cost of the product of spectra
        for (int radix : result) cost += radix == 2 ? 2.2 : radix == 3 ? 3.2 : radix == 4 ? 3.0 : radix == 5 ? 4.6 : 5.0;
        if (cost *= double(points); best == 0 || cost < best_cost) best = points, best_cost = cost;
    }
    return best;
}

}  // namespace

// A transform of `least` points or some more. Cached for the life of the process, which meets few lengths.
const Transform& transform_of(int64_t least) {
    static std::mutex lock;
    static auto& known = *new std::map<int64_t, std::pair<Transform, std::vector<Memory>>>;
    std::lock_guard<std::mutex> hold(lock);
    if (auto result = known.find(least); result != known.end()) return result->second.first;
    const int64_t points = transform_length(least);
    Transform plan;
    plan.points = points;
    std::vector<Memory> tables;
    int64_t length = points;
    for (int radix : radices(points)) {
        const int64_t part = length / radix;
        Memory table = allocate(part * (radix - 1) * 2);
        for (int64_t j = 0, i = 0; j < part; j++)
            for (int64_t k = 1; k < radix; k++, i++) {
                const double angle = -2 * 3.14159265358979323846 * double(j * k) / double(length);
                table[2 * i] = float(std::cos(angle));
                table[2 * i + 1] = float(std::sin(angle));
            }
        plan.radix[plan.levels] = radix;
        plan.twiddles[plan.levels++] = table.get();
        tables.push_back(std::move(table));
        length = part;
    }
    auto& cached = known[least];
    cached = {plan, std::move(tables)};
    return cached.first;
}

namespace {

// A least-recently-used cache. Filters are short: comparing one costs less than its transform, so no invalidation is needed.
class Spectra {
  public:
    CachedSpectra get(const Kernels& kernels, const Plan& plan, const float* wf, const Transform& transform, bool single) {
        const int64_t length = plan.rank * plan.n, width = std::max(kernels.widths[0], kernels.single_width);
        const uint64_t hash = hash_of(wf, length) ^ uint64_t(transform.points * 2 + single) ^ reinterpret_cast<uintptr_t>(&kernels);
        {
            std::lock_guard<std::mutex> hold(lock_);
            if (auto place = places_.find(hash); place != places_.end()) {
                const Entry& entry = *place->second;
                if (entry.kernels == &kernels && entry.single == single && entry.points == transform.points &&
                    entry.n == plan.n && int64_t(entry.wf.size()) == length &&
                    std::memcmp(entry.wf.data(), wf, sizeof(float) * length) == 0) {
                    entries_.splice(entries_.begin(), entries_, place->second);
                    return entry.spectra;
                }
            }
        }
        // Of a copy, to which no other thread can write: the cached spectra must be those of the key.
        Entry entry{&kernels, single, transform.points, plan.n, wf, {wf, wf + length}, hash, 0, nullptr};
        evict_versions(entry);
        const int64_t floats = plan.rank * transform.points * (single ? 4 * kernels.single_width : 2);
        Memory memory = allocate(floats), points = allocate(transform.points * 2 * width);
        (single ? kernels.spectra1 : kernels.spectra)(plan, entry.wf.data(), transform, memory.get(), points.get());
        CachedSpectra cached = entry.spectra = std::make_shared<const Memory>(std::move(memory));
        entry.floats = floats + length + 64;
        std::lock_guard<std::mutex> hold(lock_);
        floats_ += entry.floats;
        entries_.push_front(std::move(entry));
        places_[hash] = entries_.begin();  // an entry with the same hash becomes unreachable and is evicted later
        while (floats_ > LIMIT && entries_.size() > 1) evict(std::prev(entries_.end()));
        return cached;
    }

  private:
    static uint64_t hash_of(const float* numbers, int64_t count) {
        constexpr int LANES = 4;  // independent hashes shorten the dependency chain
        uint64_t hash[LANES] = {1, 2, 3, 4};
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            std::memcpy(&bits, numbers + i, sizeof bits);
            uint64_t& lane = hash[i % LANES];
            lane = (lane ^ bits) * 0x9E3779B97F4A7C15u;
            lane ^= lane >> 32;
        }
        return ((hash[0] * 31 + hash[1]) * 31 + hash[2]) * 31 + hash[3];
    }

    static constexpr int64_t LIMIT = 16 << 20;  // 64 MiB of the most recently used
    static constexpr int VERSIONS = 2;          // upper bound on entries for one address of wf
    struct Entry {
        const Kernels* kernels;
        bool single;
        int64_t points, n;
        const float* place;  // address of wf
        std::vector<float> wf;
        uint64_t hash;
        int64_t floats;
        CachedSpectra spectra;
    };

    // Training writes to the same place again and again. If all entries stayed, each step would leave a small
    // block between its large temporary ones: memory would fragment and grow.
    void evict_versions(const Entry& made) {
        std::lock_guard<std::mutex> hold(lock_);
        int versions = 1;
        for (auto entry = entries_.begin(); entry != entries_.end();) {
            const auto next = std::next(entry);
            const bool alike = entry->place == made.place && entry->single == made.single && entry->points == made.points;
            if (alike && ++versions > VERSIONS) evict(entry);
            entry = next;
        }
    }

    void evict(std::list<Entry>::iterator entry) {
        floats_ -= entry->floats;
        if (auto place = places_.find(entry->hash); place != places_.end() && place->second == entry) places_.erase(place);
        entries_.erase(entry);
    }

    std::mutex lock_;
    std::list<Entry> entries_;
    std::unordered_map<uint64_t, std::list<Entry>::iterator> places_;
    int64_t floats_ = 0;
};

}  // namespace

CachedSpectra spectra_of(const Kernels& kernels, const Plan& plan, const float* wf, const Transform& transform, bool single) {
    static auto& cached = *new Spectra;
    return cached.get(kernels, plan, wf, transform, single);
}

}  // namespace deepthin
