// Whole halves of a layer, without experts: what decoder.py composes of the operations in ops.h,
// with the same bits. One call instead of a dozen: at one token, calls took longer than arithmetic.
#pragma once

#include <cstdint>

#include "ops.h"

namespace milliways {

// The keys and values of a layer, in blocks [N, P, R, K], and how a step's rows use them.
struct LayerCache {
  void* keys;
  void* values;
  // The dtype of keys and values, and of activations: then inputs of products are rounded to it.
  bool is_bfloat16;
  const uint8_t* visible;    // [N, P]
  const int32_t* tables;     // [B, M]
  const int32_t* slots;      // [T], rows of `tables`
  const int32_t* positions;  // [T]; -1 for padding
  int64_t num_blocks, num_slots, table_size;
  int block_size, num_kv_heads, key_size;
};

struct AttentionHalf {
  const float* input_norm;  // [D], as the other norms
  const float* output_norm;
  const float* expert_norm;
  Matrix query, key, value, out;
  const float* gate;         // [D, E]
  const float* frequencies;  // [K / 2]
  int num_heads, num_experts, num_selected;
  float logit_scale;
};

// What a layer's attention half gives: the residual stream, and input and choice of experts.
struct AttentionResult {
  float* hidden;        // [T, D]; may be the input
  float* expert_input;  // [T, D]
  int32_t* expert_ids;  // [T, A]; -1 for padding
  float* gate_weights;  // [T, A]
};

// Rounds values to the dtype of activations.
void round_activations(const LayerCache& cache, float* values, int64_t count);

void attention_half(const AttentionHalf& half, const LayerCache& cache, const float* hidden,
                    int64_t num_rows, const AttentionResult& result);

// hidden + norm of the weighted sum of the experts' outputs [T, A, D]. `out` may be `hidden`.
void combine(const float* hidden, const float* outputs, const float* weights, const float* norm,
             int64_t num_rows, int num_ranks, int64_t width, float* out);

}  // namespace milliways
