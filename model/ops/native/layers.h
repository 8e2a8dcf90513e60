// All layers of a model whose parameters are in this process, in one call.
//
// Python registers where the parameters are, and gets a number. A step passes the number instead
// of a thousand arrays: with 64 layers, handing those to a compiled program took longer than the
// arithmetic of a token.
#pragma once

#include <cstdint>
#include <shared_mutex>
#include <vector>

#include "halves.h"

namespace milliways {

struct Layer {
  AttentionHalf attention;
  Experts experts;
  const float* output_norm;  // of the experts' weighted sum
};

// The layers of one model. Its Python owner keeps the arrays alive.
struct Layers {
  std::vector<Layer> each;
  int64_t width;
  int num_heads, num_kv_heads, key_size;
};

int64_t hold_layers(Layers layers);
// Waits for steps that run. A step after that finds nothing.
void drop_layers(int64_t number);
// Held while a step reads.
std::shared_lock<std::shared_mutex> lock_layers();
// Null if there is no such number, or it was dropped. The caller must hold the lock.
const Layers* find_layers(int64_t number);

// One cache for each layer; `hidden` [T, D] is changed in place.
void run_layers(const Layers& layers, const std::vector<LayerCache>& caches, int64_t num_rows,
                float* hidden);

}  // namespace milliways
