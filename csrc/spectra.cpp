// Transforms, and the spectra of filters, kept by value.
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
    std::vector<int> found;
    if (fours > 0) found.push_back(4), fours--;
    for (int radix : {5, 3})
        for (; points % radix == 0; points /= radix) found.push_back(radix);
    if (points > 1) return {};
    found.insert(found.end(), fours, 4);
    if (last) found.push_back(last);
    return found;
}

// At least `least` points, fast to transform.
int64_t transform_length(int64_t least) {
    int64_t best = 0;
    double best_cost = 0;
    for (int64_t points = std::max<int64_t>(least, 2); points <= 2 * std::max<int64_t>(least, 2); points++) {
        const auto found = radices(points);
        if (found.empty()) continue;
        double cost = 2;  // the spectra's product
        for (int radix : found) cost += radix == 2 ? 2.2 : radix == 3 ? 3.2 : radix == 4 ? 3.0 : radix == 5 ? 4.6 : 5.0;
        if (cost *= double(points); best == 0 || cost < best_cost) best = points, best_cost = cost;
    }
    return best;
}

}  // namespace

// A transform of `least` points or some more. Kept for good: a process meets few lengths.
const Transform& transform_of(int64_t least) {
    static std::mutex lock;
    static auto& known = *new std::map<int64_t, std::pair<Transform, std::vector<Memory>>>;
    std::lock_guard<std::mutex> hold(lock);
    if (auto found = known.find(least); found != known.end()) return found->second.first;
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
    auto& kept = known[least];
    kept = {plan, std::move(tables)};
    return kept.first;
}

namespace {

// Filters are short, so that comparing one costs less than its transform: no one has to say when a weight has changed.
class Spectra {
  public:
    KeptSpectra get(const Kernels& kernels, const Plan& plan, const float* wf, const Transform& transform, bool single) {
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
        // Of a copy, which no other thread can write to meanwhile: what is kept under it must be its transform.
        Entry entry{&kernels, single, transform.points, plan.n, wf, {wf, wf + length}, hash, 0, nullptr};
        forget_earlier(entry);
        const int64_t floats = plan.rank * transform.points * (single ? 4 * kernels.single_width : 2);
        Memory memory = allocate(floats), points = allocate(transform.points * 2 * width);
        (single ? kernels.spectra1 : kernels.spectra)(plan, entry.wf.data(), transform, memory.get(), points.get());
        KeptSpectra kept = entry.spectra = std::make_shared<const Memory>(std::move(memory));
        entry.floats = floats + length + 64;
        std::lock_guard<std::mutex> hold(lock_);
        floats_ += entry.floats;
        entries_.push_front(std::move(entry));
        places_[hash] = entries_.begin();  // what had this hash is found no more, and goes in its time
        while (floats_ > LIMIT && entries_.size() > 1) forget(std::prev(entries_.end()));
        return kept;
    }

  private:
    static uint64_t hash_of(const float* numbers, int64_t count) {
        constexpr int LANES = 4;  // so that no step waits for the one before
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

    static constexpr int64_t LIMIT = 16 << 20;  // 64 MiB, the latest used
    static constexpr int VERSIONS = 2;          // of what has stood at one place
    struct Entry {
        const Kernels* kernels;
        bool single;
        int64_t points, n;
        const float* place;  // where wf stood
        std::vector<float> wf;
        uint64_t hash;
        int64_t floats;
        KeptSpectra spectra;
    };

    // Training writes to the same place again and again. Were all kept, each step would leave something small between the
    // large blocks that it takes and gives back, which would then find no room again but behind it: memory would grow.
    void forget_earlier(const Entry& made) {
        std::lock_guard<std::mutex> hold(lock_);
        int versions = 1;
        for (auto entry = entries_.begin(); entry != entries_.end();) {
            const auto next = std::next(entry);
            const bool alike = entry->place == made.place && entry->single == made.single && entry->points == made.points;
            if (alike && ++versions > VERSIONS) forget(entry);
            entry = next;
        }
    }

    void forget(std::list<Entry>::iterator entry) {
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

KeptSpectra spectra_of(const Kernels& kernels, const Plan& plan, const float* wf, const Transform& transform, bool single) {
    static auto& kept = *new Spectra;
    return kept.get(kernels, plan, wf, transform, single);
}

}  // namespace deepthin
