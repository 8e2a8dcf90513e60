// Prints the rates of this machine's memory and arithmetic as one line of JSON.
// usage: machine_limits NUM_THREADS
// It is portable: it uses the compiler's vector types, with the machine's native width.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / sizeof(float);

// Much larger than any cache.
constexpr std::size_t kReadBytes = std::size_t{512} << 20;
constexpr int kNumTries = 3;
// Independent sums: enough to hide the latency of an addition, few enough for registers.
constexpr int kNumSums = 12;
constexpr long kFmaRounds = 20'000'000;

volatile float sink;

double seconds_of(int num_threads, const std::function<void(int)>& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Other load can only make a run slower, so the best try is the most accurate.
double best_seconds(int num_threads, const std::function<void(int)>& work) {
  double best = seconds_of(num_threads, work);
  for (int i = 1; i < kNumTries; ++i) best = std::min(best, seconds_of(num_threads, work));
  return best;
}

float total(const Vector* sums, int num_sums) {
  float sum = 0;
  for (int i = 0; i < num_sums; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[i][lane];
  }
  return sum;
}

double read_bytes_per_s(const std::vector<float>& memory, int num_threads) {
  const std::size_t stride = 8 * kLanes;
  const std::size_t floats_each = memory.size() / num_threads / stride * stride;
  const double seconds = best_seconds(num_threads, [&](int thread) {
    const float* begin = memory.data() + thread * floats_each;
    Vector sums[8] = {};
    for (std::size_t i = 0; i < floats_each; i += stride) {
      for (int k = 0; k < 8; ++k) {
        Vector part;
        __builtin_memcpy(&part, begin + i + k * kLanes, sizeof part);
        sums[k] += part;
      }
    }
    sink = total(sums, 8);
  });
  return floats_each * sizeof(float) * num_threads / seconds;
}

double flops_per_s(int num_threads) {
  const double seconds = best_seconds(num_threads, [](int) {
    // Different initial values, none a fixed point: otherwise the compiler could skip the work.
    Vector sums[kNumSums];
    for (int k = 0; k < kNumSums; ++k) sums[k] = Vector{} + static_cast<float>(k + 2);
    const Vector factor = Vector{} + 0.9999f;
    const Vector term = Vector{} + 1e-4f;
    for (long i = 0; i < kFmaRounds; ++i) {
      // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 12
      for (int k = 0; k < kNumSums; ++k) sums[k] = sums[k] * factor + term;
    }
    sink = total(sums, kNumSums);
  });
  return 2.0 * kLanes * kNumSums * kFmaRounds * num_threads / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (num_threads < 1) return 2;
  const std::vector<float> memory(kReadBytes / sizeof(float), 1.0f);
  std::printf(
      "{\"read_bytes_per_s_1_thread\": %.0f, \"read_bytes_per_s\": %.0f, "
      "\"flops_per_s_1_thread\": %.0f, \"flops_per_s\": %.0f}\n",
      read_bytes_per_s(memory, 1), read_bytes_per_s(memory, num_threads),
      flops_per_s(1), flops_per_s(num_threads));
}
