// The experts of a process, for threads that compute without the interpreter.
#pragma once

#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <vector>

#include "ops.h"

namespace milliways {

// Some experts of one layer, as one stack (workers/experts.py).
struct ExpertGroup {
  int layer;
  std::vector<int32_t> expert_ids;
  Experts experts;
};

// The rows of one call. Activations are float32 (4 bytes) or bfloat16 (2 bytes).
struct ExpertRows {
  const uint8_t* rows;          // [num_rows, width]
  const int32_t* ids;           // [num_rows, num_selected], -1 for no expert
  int64_t num_rows;
  // The outputs: each at its place of [num_rows, num_selected], or one after the other.
  uint8_t* out;
  bool is_compact;
};

class ExpertTable {
 public:
  ExpertTable(int num_layers, int num_experts, int num_selected, int64_t width, int item_bytes)
      : num_layers(num_layers), num_experts(num_experts), num_selected(num_selected),
        width(width), item_bytes(item_bytes), now_(std::make_shared<Snapshot>(num_layers)) {}
  const int num_layers, num_experts, num_selected;
  const int64_t width;
  const int item_bytes;

  int64_t row_bytes() const { return width * item_bytes; }
  // A request has ids [num_rows, num_selected] int32, padded to 64 bytes, and then its rows.
  int64_t ids_bytes(int64_t num_rows) const { return (num_rows * num_selected * 4 + 63) / 64 * 64; }
  int64_t request_bytes(int64_t num_rows) const {
    return ids_bytes(num_rows) + num_rows * row_bytes();
  }

  // When this returns, no thread reads the weights of the groups that were there before. It waits
  // for the computations that have begun, and for no other.
  void replace(const std::vector<ExpertGroup>& groups);
  // Whether all experts of a call are here, and all ids are in range.
  bool has(int layer, const int32_t* ids, int64_t num_places) const;
  // Computes the calls together. False, with nothing written, if an expert is not here.
  bool compute(int layer, const std::vector<ExpertRows>& calls) const;

 private:
  struct Stack {
    std::vector<int32_t> place_of_expert;  // -1 for an expert that is not in the stack
    Experts experts;
  };
  // The experts between two changes. A thread that computes keeps its snapshot to the end.
  struct Snapshot {
    explicit Snapshot(int num_layers) : layers(num_layers) {}
    ~Snapshot() { is_unused.set_value(); }
    std::vector<std::vector<Stack>> layers;
    std::promise<void> is_unused;
  };
  bool has_in(const Snapshot& snapshot, int layer, const int32_t* ids, int64_t num_places) const;
  std::shared_ptr<const Snapshot> now() const;
  mutable std::mutex mutex_;  // guards the pointer
  std::shared_ptr<Snapshot> now_;
};

// Rounds to the nearest bfloat16, ties to even, as the decoder does; a NaN stays a NaN.
uint16_t to_bfloat16(float value);

}  // namespace milliways
