#include "trace.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

namespace milliways {
namespace {

constexpr int64_t kMaxEvents = 1 << 20;
const char* const kNames[] = {"linear", "experts", "attention", "norm",      "gate",
                              "rope",   "weigh",   "write_rows", "summarize", "noise"};
static_assert(sizeof kNames / sizeof *kNames == static_cast<size_t>(Work::kCount));

struct Log {
  std::vector<Event> events;
  std::atomic<int64_t> num_events{0};
  std::atomic<bool> is_on{false};
};

// Never destroyed: at exit threads may still be inside an operation.
Log& log() {
  static auto* instance = new Log;
  return *instance;
}

int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

}  // namespace

Timed::Timed(Work work, int64_t width)
    : work_(work), width_(static_cast<int32_t>(width)), start_ns_(0) {
  if (log().is_on.load(std::memory_order_relaxed)) start_ns_ = now_ns();
}

Timed::~Timed() {
  if (start_ns_ == 0) return;
  const int64_t place = log().num_events.fetch_add(1, std::memory_order_relaxed);
  if (place < kMaxEvents) log().events[place] = {work_, width_, start_ns_, now_ns()};
}

}  // namespace milliways

namespace mw = milliways;

extern "C" {

// Neither may be called while an operation runs. The first call with 1 allocates the log.
void mw_trace(int is_on) {
  mw::log().events.resize(mw::kMaxEvents);
  mw::log().is_on.store(is_on != 0);
}
// Copies at most `max_events` events, forgets all, and returns how many were copied.
int64_t mw_take_events(mw::Event* to, int64_t max_events) {
  const int64_t count = std::min({mw::log().num_events.exchange(0), mw::kMaxEvents, max_events});
  if (count > 0) std::memcpy(to, mw::log().events.data(), count * sizeof(mw::Event));
  return count;
}
// The name of a kind of work; null for a number that has none.
const char* mw_work_name(int32_t work) {
  return work >= 0 && work < static_cast<int32_t>(mw::Work::kCount) ? mw::kNames[work] : nullptr;
}

}  // extern "C"
