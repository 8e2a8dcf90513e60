#include "layers.h"

#include <mutex>
#include <unordered_map>
#include <utility>

#include "expert_table.h"
#include "trace.h"

namespace milliways {
namespace {

// Never destroyed: at exit threads may still be inside a step.
struct Held {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, Layers> by_number;
  int64_t last = 0;
};

Held& held() {
  static auto* instance = new Held;
  return *instance;
}

}  // namespace

int64_t hold_layers(Layers layers) {
  std::unique_lock<std::shared_mutex> lock(held().mutex);
  held().by_number[++held().last] = std::move(layers);
  return held().last;
}

void drop_layers(int64_t number) {
  std::unique_lock<std::shared_mutex> lock(held().mutex);
  held().by_number.erase(number);
}

std::shared_lock<std::shared_mutex> lock_layers() { return std::shared_lock(held().mutex); }

const Layers* find_layers(int64_t number) {
  const auto found = held().by_number.find(number);
  return found == held().by_number.end() ? nullptr : &found->second;
}

void run_layers(const Layers& layers, const std::vector<LayerCache>& caches, int64_t num_rows,
                float* hidden) {
  const int64_t width = layers.width;
  thread_local std::vector<float> input, weights, outputs;
  thread_local std::vector<int32_t> ids;
  input.resize(num_rows * width);
  for (size_t i = 0; i < layers.each.size(); i++) {
    const Layer& layer = layers.each[i];
    const int num_ranks = layer.attention.num_selected;
    ids.resize(num_rows * num_ranks);
    weights.resize(num_rows * num_ranks);
    outputs.resize(num_rows * num_ranks * width);
    attention_half(layer.attention, caches[i], hidden, num_rows,
                   {hidden, input.data(), ids.data(), weights.data()});
    {
      const Timed timed(Work::kExperts);
      expert_ffn(input.data(), ids.data(), num_rows, num_ranks, layer.experts, outputs.data());
    }
    const Timed timed(Work::kWeigh);
    round_activations(caches[i], outputs.data(), num_rows * num_ranks * width);
    combine(hidden, outputs.data(), weights.data(), layer.output_norm, num_rows, num_ranks, width,
            hidden);
  }
}

}  // namespace milliways
