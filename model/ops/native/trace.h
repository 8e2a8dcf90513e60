// A log of which operation ran when, for `milliways.benchmarks.steps`. It is off until it is started;
// then an operation costs two readings of the clock more. Results do not depend on it.
#pragma once

#include <cstdint>

namespace milliways {

// The names in trace.cc have the same order.
enum class Work : int32_t {
  kLinear,
  kExperts,
  kAttention,
  kNorm,
  kGate,
  kRope,
  kWeigh,
  kWriteRows,
  kSummarize,
  kNoise,
  kCount,
};

struct Event {
  Work work;
  int32_t width;  // columns of the result, to tell the output head from other products
  int64_t start_ns, end_ns;
};

// Logs the time from its construction to its end.
class Timed {
 public:
  explicit Timed(Work work, int64_t width = 0);
  ~Timed();
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  const Work work_;
  const int32_t width_;
  int64_t start_ns_;
};

}  // namespace milliways
