// Memory and threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "linear.h"

namespace deepthin {
namespace {

std::atomic<int64_t> allocations_left{-1};

// Spins for a short time before it blocks: waking a thread takes longer than many products.
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

// A pool of waiting threads. One product at a time uses it; a concurrent one runs on its own thread alone.
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
    std::atomic<int64_t> turn_{0};  // counts the products; modulo MOST it is the number of helpers of the last one
    std::atomic<int64_t> next_{0}, active_{0};
    std::exception_ptr failure_;
};

std::atomic<Pool*> pool_of_process{nullptr};

// The threads of a framework's GNU OpenMP, if they were set: two pools would compete for the same cores.
std::atomic<OpenMpParallel> framework_threads{nullptr};

// A forked child has none of its parent's threads: it starts a new pool. (OpenMP would wait for them for ever.)
void handle_forks() {
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        pool_of_process.store(nullptr);
        framework_threads.store(nullptr);
    });
    (void)registered;
#endif
}

// Never destroyed: threads may still wait in it when the process ends.
Pool& pool() {
    Pool* found = pool_of_process.load();
    if (found) return *found;
    handle_forks();
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

void use_openmp(OpenMpParallel parallel) {
    handle_forks();
    framework_threads = parallel;
}

void fail_allocation_after(int64_t count) { allocations_left = count; }

}  // namespace deepthin
