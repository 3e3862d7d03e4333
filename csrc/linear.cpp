// What is done once a product, whatever the instruction set: plans, transforms, memory, threads, and what is not finite.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "linear.h"

namespace deepthin {
namespace {

// ---- Memory ------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocations_left{-1};

// Working memory that a thread keeps from call to call.
float* scratch(int64_t floats) {
    thread_local Memory kept;
    thread_local int64_t size = 0;
    if (size < floats) {
        size = 0;
        kept.reset();
        kept = allocate(floats);
        size = floats;
    }
    return kept.get();
}

// ---- Threads -----------------------------------------------------------------------------------------------------------

// Waits some time with open eyes: waking a thread takes longer than many a product.
template <class Condition>
bool spin_until(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
        for (int i = 0; i < 64; i++) {
            if (condition()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < end);
    return condition();
}

// Threads that wait for work. One product at a time has them; another that comes meanwhile does its work alone.
class Pool {
  public:
    void run(int64_t tasks, int threads, const std::function<void(int64_t)>& work) {
        std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine.owns_lock()) {
            for (int64_t i = 0; i < tasks; i++) work(i);
            return;
        }
        const int64_t helpers = std::min<int64_t>({threads, tasks, MOST}) - 1;
        while (started_ < helpers) {
            std::thread([this, number = started_] { serve(number); }).detach();
            started_++;
        }
        work_ = &work;
        tasks_ = tasks;
        next_ = 0;
        failure_ = nullptr;
        active_ = helpers;
        {
            std::lock_guard<std::mutex> hold(lock_);
            turn_ = (turn_ / MOST + 1) * MOST + helpers;
        }
        wake_.notify_all();
        take_tasks();
        if (!spin_until([this] { return active_ == 0; })) {
            std::unique_lock<std::mutex> hold(lock_);
            done_.wait(hold, [this] { return active_ == 0; });
        }
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

  private:
    static constexpr int64_t MOST = 1024;  // threads

    void take_tasks() {
        try {
            for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) (*work_)(i);
        } catch (...) {
            next_ = tasks_;
            std::lock_guard<std::mutex> hold(lock_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void serve(int64_t number) {
        for (int64_t seen = 0;;) {
            if (!spin_until([&] { return turn_ != seen; })) {
                std::unique_lock<std::mutex> hold(lock_);
                wake_.wait(hold, [&] { return turn_ != seen; });
            }
            seen = turn_;
            if (number >= seen % MOST) continue;
            take_tasks();
            std::lock_guard<std::mutex> hold(lock_);
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, lock_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t)>* work_ = nullptr;
    int64_t tasks_ = 0, started_ = 0;
    std::atomic<int64_t> turn_{0};  // counts the products; its remainder by MOST is how many helpers the last one has
    std::atomic<int64_t> next_{0}, active_{0};
    std::exception_ptr failure_;
};

std::atomic<Pool*> pool_of_process{nullptr};

// The threads of a framework's GNU OpenMP, where we were told of them: two pools would fight for the same cores.
std::atomic<OpenMpParallel> framework_threads{nullptr};

// A forked child has none of its parent's threads: it gets a pool of its own. (OpenMP would wait for them for ever.)
void mind_forks() {
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        pool_of_process.store(nullptr);
        framework_threads.store(nullptr);
    });
    (void)registered;
#endif
}

// Never destroyed: its threads may wait in it when the process ends.
Pool& pool() {
    Pool* found = pool_of_process.load();
    if (found) return *found;
    mind_forks();
    auto fresh = std::make_unique<Pool>();
    if (pool_of_process.compare_exchange_strong(found, fresh.get())) return *fresh.release();
    return *found;
}

struct Region {
    Region(const std::function<void(int64_t)>& work, int64_t tasks) : work(work), tasks(tasks) {}

    const std::function<void(int64_t)>& work;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::mutex lock;
    std::exception_ptr failure;

    static void enter(void* self) {
        Region& region = *static_cast<Region*>(self);
        try {
            for (int64_t i; (i = region.next.fetch_add(1)) < region.tasks;) region.work(i);
        } catch (...) {
            region.next = region.tasks;
            std::lock_guard<std::mutex> hold(region.lock);
            region.failure = std::current_exception();
        }
    }
};

}  // namespace

void Release::operator()(float* memory) const { std::free(memory); }

Memory allocate(int64_t floats) {
    if (allocations_left.load(std::memory_order_relaxed) >= 0 && allocations_left.fetch_sub(1) == 0) throw std::bad_alloc();
    if (floats > int64_t(1) << 58) throw std::bad_alloc();
    const std::size_t bytes = (std::size_t(floats) * sizeof(float) + 64) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return Memory(static_cast<float*>(memory));
}

void in_parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& work) {
    if (threads < 2 || tasks < 2) {
        for (int64_t i = 0; i < tasks; i++) work(i);
    } else if (const OpenMpParallel parallel = framework_threads.load()) {
        Region region(work, tasks);
        parallel(Region::enter, &region, unsigned(std::min<int64_t>(threads, tasks)), 0);
        if (region.failure) std::rethrow_exception(region.failure);
    } else {
        pool().run(tasks, threads, work);
    }
}

namespace {

// ---- Transforms --------------------------------------------------------------------------------------------------------

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

// ---- Spectra of filters, kept by value ---------------------------------------------------------------------------------

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

Spectra& spectra() {
    static auto& kept = *new Spectra;
    return kept;
}

// ---- One item in plain loops, for what is not finite -------------------------------------------------------------------

void exact(const Job& job, int64_t item) {
    const Plan& p = job.plan;
    const float* x = job.x + item * p.cols;
    float* y = job.y + item * p.rows;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    bool lost = false;  // an input that is not a number makes every output one
    for (int64_t q = 0; q < p.cols; q++) lost |= std::isnan(x[q]);
    for (int64_t j = 0; j < p.rows; j++) {
        const int64_t begin = p.offset + j * p.cols, end = begin + p.cols;
        float sum = 0;
        bool gone = lost;
        for (int64_t i = begin / p.n * p.rank; i < ((end - 1) / p.n + 1) * p.rank; i++) gone |= std::isnan(job.xf[i]);
        for (int64_t e = begin; e < end && !gone && !std::isnan(sum);) {
            const int64_t row = e / p.n, stop = std::min(end, (row + 1) * p.n);
            for (; e < stop; e++) {
                float weight = 0;
                for (int64_t a = 0; a < p.rank; a++) weight += job.xf[row * p.rank + a] * job.wf[a * p.n + e % p.n];
                sum += weight * x[e - begin];
            }
        }
        sum = gone ? nan : sum * job.scale;
        if (job.bias) sum += job.bias[j];
        y[j] = job.relu && sum < 0 ? 0 : sum;
    }
}

}  // namespace

std::vector<Block> split(const Kernels& kernels, int64_t batch, bool alone) {
    constexpr int64_t FEW = 3;
    std::vector<Block> blocks;
    for (int64_t first = 0; first < batch;) {
        const int64_t rest = batch - first;
        int width = kernels.widths[1] && rest <= kernels.widths[1] ? kernels.widths[1] : kernels.widths[0];
        if (alone && rest <= FEW) width = 1;
        blocks.push_back({first, std::min<int64_t>(rest, width), width});
        first += blocks.back().items;
    }
    return blocks;
}

namespace {

Transform transform_of_items(const Plan& plan) {
    return transform_of((plan.cols + 1) / 2 + plan.n - 1);
}

bool is_plain_rank(const Plan& plan) { return plan.n == plan.cols && plan.offset == 0; }

}  // namespace

void use_openmp(OpenMpParallel parallel) {
    mind_forks();
    framework_threads = parallel;
}

void fail_allocation_after(int64_t count) { allocations_left = count; }

Plan make_plan(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset) {
    constexpr int64_t LIMIT = int64_t(1) << 31;
    const auto within = [](int64_t value) { return 0 < value && value < LIMIT; };
    if (!within(rows) || !within(cols) || !within(n) || !within(rank) || offset < 0 || offset >= n)
        throw std::invalid_argument("rows, cols, n and rank must be from 1 to 2^31 - 1, and 0 <= offset < n");
    Plan plan{rows, cols, n, rank, (offset + rows * cols - 1) / n + 1, offset, 0, 0, 0, 0};
    plan.common = std::gcd(n, cols);
    plan.phases = n / plan.common;
    plan.step = cols / plan.common;
    plan.blocks = (n - 1 + cols - 1) / n + 1;
    if (plan.common == n) plan.blocks = (offset + cols - 1) / n + 1;  // all outputs start at the same place
    return plan;
}

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(DEEPTHIN_EMULATE_V4)
    const bool v4 = v3;
#else
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const std::pair<const Kernels*, bool> known[] = {
        {&kernels_v4, v4}, {&kernels_v3, v3}, {&kernels_v2, __builtin_cpu_supports("sse4.2") != 0}};
#else
    const std::pair<const Kernels*, bool> known[] = {{&kernels_baseline, true}};
#endif
    for (auto [kernels, usable] : known)
        if (usable && (!name || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

Product::Product(const Kernels& kernels, const Plan& plan, const float* xf, const float* wf, const float* bias, bool fft,
                 float scale, bool relu, const std::vector<Block>& blocks, bool often)
    : kernels_(&kernels) {
    job_.plan = plan;
    job_.xf = xf, job_.wf = wf, job_.bias = bias, job_.scale = scale, job_.relu = relu;
    const bool alone = !blocks.empty() && blocks.back().width == 1;
    if (const int64_t floats = often && alone ? kernels.packed_floats(plan) : 0) {
        packed_ = allocate(floats);
        kernels.pack(plan, xf, packed_.get());
        job_.packed = packed_.get();
    }
    if (!fft || is_plain_rank(plan) || blocks.empty()) return;
    if (blocks.front().width > 1) {
        job_.lanes = transform_of_items(plan);
        kept_ = spectra().get(kernels, plan, wf, job_.lanes, false);
        job_.spectra = kept_->get();
    }
    if (alone) {
        const int64_t width = kernels.single_width, half = ((plan.cols + 1) / 2 + width - 1) / width;
        job_.single = transform_of(half + (plan.n + width - 2) / width);
        kept1_ = spectra().get(kernels, plan, wf, job_.single, true);
        job_.spectra1 = kept1_->get();
    }
}

void Product::operator()(const Block& block, const float* x, float* y) const {
    Job job = job_;
    job.x = x, job.y = y;
    uint32_t odd;
    if (block.width == 1)
        odd = !kernels_->single(job, block.first, scratch(kernels_->single_scratch(job)));
    else
        odd = kernels_->forward(job, block.width, block.first, block.items,
                                scratch(kernels_->forward_scratch(job, block.width)));
    for (int64_t b = 0; odd; b++, odd >>= 1)
        if (odd & 1) exact(job, block.first + b);
}

void forward(const Kernels& kernels, const Plan& plan, const float* x, const float* xf, const float* wf,
             const float* bias, float* y, int64_t batch, bool fft, float scale, bool relu, int threads) {
    const auto blocks = split(kernels, batch, true);
    const Product product(kernels, plan, xf, wf, bias, fft, scale, relu, blocks, false);
    in_parallel(int64_t(blocks.size()), threads, [&](int64_t i) { product(blocks[i], x, y); });
}

InputGradient::InputGradient(const Kernels& kernels, const Plan& plan, const float* xf, const float* wf, bool fft,
                             const std::vector<Block>& blocks)
    : kernels_(&kernels) {
    job_.plan = plan;
    job_.xf = xf, job_.wf = wf;
    if (!fft || is_plain_rank(plan) || blocks.empty()) return;
    job_.lanes = transform_of_items(plan);
    kept_ = spectra().get(kernels, plan, wf, job_.lanes, false);
    job_.spectra = kept_->get();
}

void InputGradient::operator()(const Block& block, const float* grad, float* grad_x) const {
    Job job = job_;
    job.grad = grad, job.grad_x = grad_x;
    kernels_->backward(job, block.width, block.first, block.items, scratch(kernels_->backward_scratch(job, block.width)));
}

void backward(const Kernels& kernels, const Plan& plan, const float* x, const float* xf, const float* wf,
              const float* grad, float* grad_x, float* grad_xf, float* grad_wf, int64_t batch, bool fft, int threads) {
    Job job{};
    job.plan = plan;
    job.x = x, job.xf = xf, job.wf = wf, job.grad = grad, job.grad_x = grad_x;
    KeptSpectra kept;
    if (fft && !is_plain_rank(plan)) {
        job.lanes = transform_of_items(plan);
        kept = spectra().get(kernels, plan, wf, job.lanes, false);
        job.spectra = kept->get();
    }
    const int width = kernels.widths[1] && batch <= kernels.widths[1] ? kernels.widths[1] : kernels.widths[0];
    const int64_t bundle = width * kernels.bundle, bundles = (batch + bundle - 1) / bundle;
    // Slices of the batch, each with sums of its own: as many as the batch says, so that threads do not matter.
    const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(8, bundles / 2));
    const int64_t xf_floats = plan.m * plan.rank, wf_floats = grad_wf ? gradient_floats(job, width) : 0;
    Memory sums_xf = allocate(grad_xf ? (slices - 1) * xf_floats : 0), sums_wf = allocate(slices * wf_floats);
    in_parallel(slices, threads, [&](int64_t slice) {
        Job part = job;
        if (grad_xf) {
            part.grad_xf = slice == 0 ? grad_xf : sums_xf.get() + (slice - 1) * xf_floats;
            std::memset(part.grad_xf, 0, sizeof(float) * xf_floats);
        }
        if (grad_wf) {
            part.grad_wf = sums_wf.get() + slice * wf_floats;
            std::memset(part.grad_wf, 0, sizeof(float) * wf_floats);
        }
        float* memory = scratch(kernels.backward_scratch(part, width));
        for (int64_t i = bundles * slice / slices; i < bundles * (slice + 1) / slices; i++)
            kernels.backward(part, width, i * bundle, std::min<int64_t>(bundle, batch - i * bundle), memory);
    });
    for (int64_t slice = 1; slice < slices; slice++) {
        const float* from = sums_xf.get() + (slice - 1) * xf_floats;
        for (int64_t i = 0; grad_xf && i < xf_floats; i++) grad_xf[i] += from[i];
        const float* lanes = sums_wf.get() + slice * wf_floats;
        for (int64_t i = 0; i < wf_floats; i++) sums_wf[i] += lanes[i];
    }
    if (grad_wf) kernels.finish_grad_wf(job, width, sums_wf.get(), grad_wf);
}

void csr(const Kernels& kernels, const float* values, const int32_t* columns, const int64_t* starts, int64_t rows,
         int64_t cols, int64_t entries, const float* bias, const float* x, float* y, int64_t batch, int threads) {
    bool valid = starts[0] == 0 && starts[rows] == entries;
    for (int64_t j = 0; j < rows; j++) valid &= starts[j] <= starts[j + 1];
    for (int64_t i = 0; i < entries; i++) valid &= uint32_t(columns[i]) < uint64_t(cols);
    if (!valid) throw std::invalid_argument("row starts must rise from 0 to the number of entries, columns lie within the matrix");
    const auto blocks = split(kernels, batch, true);
    in_parallel(int64_t(blocks.size()), threads, [&](int64_t i) {
        const Block& block = blocks[i];
        kernels.csr(values, columns, starts, rows, cols, bias, x + block.first * cols, y + block.first * rows, block.width,
                    block.items, scratch(kernels.csr_scratch(rows, cols, block.width)));
    });
}

void symbols(const Kernels& kernels, const Symbols& given, const float* x, float* y, int64_t batch, int threads) {
    float table[SYMBOL_LEVELS];
    Symbols s = given;
    if (s.table) {
        if (s.levels < 1 || s.levels > kernels.levels[1]) throw std::invalid_argument("too many shared values for this instruction set");
        std::fill(std::copy(s.table, s.table + s.levels, table), table + SYMBOL_LEVELS, std::numeric_limits<float>::quiet_NaN());
        s.table = table;
    }
    const auto weight = [&s](int64_t row, int64_t col) {
        const uint8_t symbol = s.symbols[row * s.cols + col];
        if (s.table) return symbol < s.levels ? s.table[symbol] : std::numeric_limits<float>::quiet_NaN();
        const float step = s.step[s.by_row ? row : 0];
        return s.least ? s.least[s.by_row ? row : 0] + step * float(symbol) : step * float(int8_t(symbol));
    };
    constexpr int64_t ROWS = 128;  // at a time: enough to be worth the inputs' being laid out, few enough for threads to share
    const int64_t parts = (s.rows + ROWS - 1) / ROWS, blocks = (batch + SYMBOL_ITEMS - 1) / SYMBOL_ITEMS;
    in_parallel(parts * blocks, threads, [&](int64_t i) {
        const int64_t item = i / parts * SYMBOL_ITEMS, row = i % parts * ROWS;
        const int64_t stop = std::min(row + ROWS, s.rows), items = std::min<int64_t>(SYMBOL_ITEMS, batch - item);
        uint32_t odd = kernels.symbols(s, x + item * s.cols, y + item * s.rows, items, row, stop,
                                       scratch(kernels.symbols_scratch(s.cols)));
        for (int64_t b = item; odd; b++, odd >>= 1)
            for (int64_t j = row; odd & 1 && j < stop; j++) {
                float sum = 0;
                for (int64_t q = 0; q < s.cols; q++) sum += x[b * s.cols + q] * weight(j, q);
                y[b * s.rows + j] = sum + (s.bias ? s.bias[j] : 0.0f);
            }
    });
}

}  // namespace deepthin
