#include "threads.h"

#include <pthread.h>
#include <sched.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace milliways {
namespace {

// About 50 microseconds: longer than the pauses in a step, shorter than those between steps.
constexpr int kSpins = 1500;
constexpr int kMaxTasks = (1 << 20) - 1024;
constexpr int kMaxThreads = 256;

// The processors in a control group's quota, rounded up; a large number if there is no quota.
int num_processors_of_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota_us, period_us;
  if (!(file >> quota_us >> period_us) || period_us <= 0) return kMaxThreads;
  return static_cast<int>(std::ceil(quota_us / period_us));
}

// While a task runs, subnormal numbers count as zero. XLA sets this in its threads; ours must do
// the same, so that the bits of a task do not depend on the thread that runs it.
class FlushTinyNumbers {
 public:
#if defined(__x86_64__)
  FlushTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTinyNumbers() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#elif defined(__aarch64__)
  FlushTinyNumbers() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t{1} << 24));
  }
  ~FlushTinyNumbers() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// The state of a region in one word: its number, its number of tasks, and the next task. A thread
// claims a task with one addition, and cannot claim a task of another region by mistake.
struct Ticket {
  uint64_t word;
  static Ticket make(uint64_t region, int num_tasks) {
    return {region << 40 | static_cast<uint64_t>(num_tasks) << 20};
  }
  uint64_t region() const { return word >> 40; }
  int num_tasks() const { return static_cast<int>(word >> 20 & 0xFFFFF); }
  int next() const { return static_cast<int>(word & 0xFFFFF); }
};

class Pool {
 public:
  explicit Pool(int num_threads) {
    try {
      for (int i = 1; i < num_threads; i++) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      // The system allows no more threads: the existing ones do the work.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_ = true;
    }
    awake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int num_tasks, const std::function<void(int)>& task) {
    task_ = &task;
    num_done_.store(0, std::memory_order_relaxed);
    region_ = (region_ + 1) & 0xFFFFFF;
    ticket_.store(Ticket::make(region_, num_tasks).word);
    if (num_sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      awake_.notify_all();
    }
    work();
    for (int spins = 0; num_done_.load(std::memory_order_acquire) < num_tasks; spins++) {
      // A thread that was preempted during its task may need this processor.
      if (spins < kSpins) pause_thread();
      else sched_yield();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // Runs tasks until none is left. The fields of a region do not change until its last task ends.
  void work() {
    for (;;) {
      const Ticket ticket{ticket_.fetch_add(1, std::memory_order_acq_rel)};
      if (ticket.next() >= ticket.num_tasks()) return;
      try {
        (*task_)(ticket.next());
      } catch (...) {
        std::lock_guard<std::mutex> lock(failure_mutex_);
        failure_ = std::current_exception();
      }
      num_done_.fetch_add(1, std::memory_order_release);
    }
  }

  void serve() {
    const FlushTinyNumbers flush;
    uint64_t seen = Ticket{ticket_.load()}.region();
    while (!stopping_.load(std::memory_order_relaxed)) {
      for (int i = 0; i < kSpins && region() == seen; i++) pause_thread();
      if (region() == seen) sleep_while(seen);
      seen = region();
      work();
    }
  }

  void sleep_while(uint64_t seen) {
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    num_sleeping_.fetch_add(1);
    awake_.wait(lock, [&] { return stopping_.load() || region() != seen; });
    num_sleeping_.fetch_sub(1);
  }

  uint64_t region() const { return Ticket{ticket_.load()}.region(); }

  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> num_done_{0};
  const std::function<void(int)>* task_ = nullptr;
  uint64_t region_ = 0;
  // Why a task failed; the reason of the last one, if several failed.
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  std::mutex sleep_mutex_;
  std::condition_variable awake_;
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

// Never destroyed: at exit JAX's own threads may still be inside a region.
struct Shared {
  std::mutex mutex;
  std::unique_ptr<Pool> pool;
  std::atomic<int> wanted{num_usable_processors()};
};

Shared& shared() {
  static Shared* instance = [] {
    auto* made = new Shared;
    // A forked child process does not have the threads; it starts its own.
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                     (void)shared().pool.release();
                     shared().mutex.unlock();
                   });
    return made;
  }();
  return *instance;
}

void run_alone(int num_tasks, const std::function<void(int)>& task) {
  for (int i = 0; i < num_tasks; i++) task(i);
}

}  // namespace

void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int num_usable_processors() {
  cpu_set_t set;
  const bool is_known = sched_getaffinity(0, sizeof set, &set) == 0;
  const int count = is_known ? CPU_COUNT(&set) : std::thread::hardware_concurrency();
  return std::clamp(std::min(count, num_processors_of_quota()), 1, kMaxThreads);
}

void run_tasks(int num_tasks, const std::function<void(int)>& task) {
  const FlushTinyNumbers flush;
  Shared& s = shared();
  if (num_tasks < 2 || s.wanted < 2) return run_alone(num_tasks, task);
  std::unique_lock<std::mutex> lock(s.mutex, std::try_to_lock);
  if (!lock.owns_lock() || num_tasks > kMaxTasks) return run_alone(num_tasks, task);
  if (!s.pool) s.pool = std::make_unique<Pool>(s.wanted);
  s.pool->run(num_tasks, task);
}

void set_num_threads(int num_threads) {
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.pool.reset();
  s.wanted = std::clamp(num_threads, 1, kMaxThreads);
}

int num_threads() { return shared().wanted; }

}  // namespace milliways
