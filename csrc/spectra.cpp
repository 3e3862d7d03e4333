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

// What a level costs a point: its arithmetic, and its loads and stores; on few registers large radices spill. Fitted to the
// times of all factorisations of 36 lengths: the cheapest one takes 4 % longer than the fastest, on average.
struct Radix {
    int radix;
    double cost, on_few;  // with 32 vector registers, and with 16
};
constexpr Radix RADICES[] = {{2, 4.6, 4.6}, {3, 5.7, 5.7}, {4, 5.8, 5.8}, {5, 7.2, 7.4},
                             {6, 6.7, 6.9}, {8, 7.0, 7.6}, {10, 8.1, 9.0}, {12, 7.7, 9.0}};

struct Factorisation {
    std::vector<int> radices;  // ascending: the first level exceeds the first cache, so that few streams are better
    double cost = 0;           // of a point
};

// Appends the cheapest radices for `length` points to those `chosen` until now; keeps the result in `best` if it is cheaper.
void factorise(int64_t length, bool few, Factorisation& chosen, Factorisation& best) {
    if (length == 1) {
        if (best.radices.empty() || chosen.cost < best.cost) best = chosen;
        return;
    }
    const bool first = chosen.radices.empty();
    for (auto [radix, usual, on_few] : RADICES) {
        if (length % radix || (!first && radix < chosen.radices.back())) continue;
        const int64_t part = length / radix;
        double cost = few ? on_few : usual;
        if (first && part == 1) continue;  // there is a first and a last level
        if (first) cost += 0.2 * std::max(0, radix - 4);
        if (part % 32 == 0 && radix >= 8) cost += 2;  // all streams in one set of the cache
        if (part == 1 && radix < 5) cost += 1;
        chosen.radices.push_back(radix);
        chosen.cost += cost;
        factorise(part, few, chosen, best);
        chosen.cost -= cost;
        chosen.radices.pop_back();
    }
}

// Of at least `least` points, fast to transform.
std::vector<int> radices_of(int64_t least, bool few) {
    std::vector<int> result;
    double best_cost = 0;
    least = std::max<int64_t>(least, 4);
    for (int64_t points = least; points <= 2 * least; points++) {
        Factorisation chosen, best;
        factorise(points, few, chosen, best);
        const double cost = (best.cost + 4) * double(points);  // with that of the product of spectra
        if (!best.radices.empty() && (result.empty() || cost < best_cost)) result = best.radices, best_cost = cost;
    }
    return result;
}

}  // namespace

// A transform of `least` points or some more. Cached for the life of the process, which meets few lengths.
const Transform& transform_of(const Kernels& kernels, int64_t least) {
    static std::mutex lock;
    static auto& known = *new std::map<std::pair<int64_t, bool>, std::pair<Transform, std::vector<Memory>>>;
    const bool few = kernels.widths[0] <= 8;  // AVX-512 has twice as many registers
    std::lock_guard<std::mutex> hold(lock);
    if (auto result = known.find({least, few}); result != known.end()) return result->second.first;
    Transform plan;
    plan.points = 1;
    std::vector<Memory> tables;
    std::vector<double> angles{0.25};  // of the blocks' roots c, as parts of a circle: z^points = j
    for (int radix : radices_of(least, few)) {
        Memory table = allocate(int64_t(angles.size()) * (radix - 1) * 2);
        std::vector<double> parts;
        for (size_t b = 0, i = 0; b < angles.size(); b++)
            for (int k = 0; k < radix; k++) {
                parts.push_back((angles[b] - k) / radix);
                if (k == 0) continue;
                const double angle = 2 * 3.14159265358979323846 * angles[b] * k / radix;
                table[i++] = float(std::cos(angle));
                table[i++] = float(std::sin(angle));
            }
        plan.points *= radix;
        plan.radix[plan.levels] = radix;
        plan.twiddles[plan.levels++] = table.get();
        tables.push_back(std::move(table));
        angles = std::move(parts);
    }
    auto& cached = known[{least, few}];
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
