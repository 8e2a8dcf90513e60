#include "expert_table.h"

#include <cmath>
#include <cstring>
#include <mutex>

namespace milliways {
namespace {

void widen(const uint8_t* from, int64_t count, int item_bytes, float* to) {
  if (item_bytes == 4) {
    std::memcpy(to, from, count * 4);
    return;
  }
  const auto* halves = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

void narrow(const float* from, int64_t count, int item_bytes, uint8_t* to) {
  if (item_bytes == 4) {
    std::memcpy(to, from, count * 4);
    return;
  }
  auto* halves = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
}

}  // namespace

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void ExpertTable::replace(const std::vector<ExpertGroup>& groups) {
  auto next = std::make_shared<Snapshot>(num_layers);
  for (const ExpertGroup& group : groups) {
    Stack stack{std::vector<int32_t>(num_experts, -1), group.experts};
    for (size_t i = 0; i < group.expert_ids.size(); i++) {
      stack.place_of_expert[group.expert_ids[i]] = static_cast<int32_t>(i);
    }
    next->layers[group.layer].push_back(std::move(stack));
  }
  std::future<void> is_unused;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_unused = now_->is_unused.get_future();
    now_.swap(next);
  }
  next.reset();
  is_unused.wait();
}

std::shared_ptr<const ExpertTable::Snapshot> ExpertTable::now() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return now_;
}

bool ExpertTable::has(int layer, const int32_t* ids, int64_t num_places) const {
  return has_in(*now(), layer, ids, num_places);
}

bool ExpertTable::has_in(const Snapshot& snapshot, int layer, const int32_t* ids,
                         int64_t num_places) const {
  if (layer < 0 || layer >= num_layers) return false;
  for (int64_t i = 0; i < num_places; i++) {
    if (ids[i] == -1) continue;
    if (ids[i] < 0 || ids[i] >= num_experts) return false;
    bool is_here = false;
    for (const Stack& stack : snapshot.layers[layer]) {
      is_here |= stack.place_of_expert[ids[i]] >= 0;
    }
    if (!is_here) return false;
  }
  return true;
}

bool ExpertTable::compute(int layer, const std::vector<ExpertRows>& calls) const {
  const std::shared_ptr<const Snapshot> snapshot = now();
  int64_t num_rows = 0;
  for (const ExpertRows& call : calls) {
    if (!has_in(*snapshot, layer, call.ids, call.num_rows * num_selected)) return false;
    num_rows += call.num_rows;
  }
  thread_local std::vector<float> rows, outputs;
  thread_local std::vector<int32_t> places;
  rows.resize(num_rows * width);
  places.resize(num_rows * num_selected);
  outputs.resize(num_rows * num_selected * width);
  int64_t row = 0;
  for (const ExpertRows& call : calls) {
    widen(call.rows, call.num_rows * width, item_bytes, &rows[row * width]);
    row += call.num_rows;
  }
  const int64_t row_bytes = width * item_bytes;
  for (const Stack& stack : snapshot->layers[layer]) {
    bool is_wanted = false;
    int64_t place = 0;
    for (const ExpertRows& call : calls) {
      for (int64_t i = 0; i < call.num_rows * num_selected; i++, place++) {
        places[place] = call.ids[i] < 0 ? -1 : stack.place_of_expert[call.ids[i]];
        is_wanted |= places[place] >= 0;
      }
    }
    if (!is_wanted) continue;
    expert_ffn(rows.data(), places.data(), num_rows, num_selected, stack.experts, outputs.data());
    place = 0;
    for (const ExpertRows& call : calls) {
      int64_t rank = 0;
      for (int64_t i = 0; i < call.num_rows * num_selected; i++, place++) {
        const int64_t to = call.is_compact ? rank : i;
        if (call.ids[i] >= 0) rank++;
        if (places[place] < 0) continue;
        narrow(&outputs[place * width], width, item_bytes, call.out + to * row_bytes);
      }
    }
  }
  return true;
}

}  // namespace milliways
