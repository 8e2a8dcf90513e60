#include "halves.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "expert_table.h"
#include "threads.h"
#include "trace.h"

namespace milliways {
namespace {

float as_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void add_rows(const float* left, const float* right, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = left[i] + right[i];
}

// The place of a row's key and value, in positions of the whole cache; -1 if it has none.
int64_t place_of(const LayerCache& cache, int64_t row) {
  const int64_t position = cache.positions[row], slot = cache.slots[row];
  if (position < 0 || slot < 0 || slot >= cache.num_slots) return -1;
  const int64_t entry = position / cache.block_size;
  if (entry >= cache.table_size) return -1;
  const int64_t block = cache.tables[slot * cache.table_size + entry];
  if (block < 0 || block >= cache.num_blocks) return -1;
  return block * cache.block_size + position % cache.block_size;
}

void write_row(const LayerCache& cache, void* blocks, int64_t place, const float* row) {
  const int64_t width = static_cast<int64_t>(cache.num_kv_heads) * cache.key_size;
  if (!cache.is_bfloat16) {
    std::memcpy(static_cast<float*>(blocks) + place * width, row, width * sizeof(float));
    return;
  }
  uint16_t* const to = static_cast<uint16_t*>(blocks) + place * width;
  for (int64_t i = 0; i < width; i++) to[i] = to_bfloat16(row[i]);
}

void write_rows(const LayerCache& cache, const float* keys, const float* values,
                int64_t num_rows) {
  const int64_t width = static_cast<int64_t>(cache.num_kv_heads) * cache.key_size;
  for (int64_t i = 0; i < num_rows; i++) {
    const int64_t place = place_of(cache, i);
    if (place < 0) continue;
    write_row(cache, cache.keys, place, keys + i * width);
    write_row(cache, cache.values, place, values + i * width);
  }
}

// The block table of each row.
std::vector<int32_t> row_tables(const LayerCache& cache, int64_t num_rows) {
  std::vector<int32_t> tables(num_rows * cache.table_size);
  for (int64_t i = 0; i < num_rows; i++) {
    const int64_t slot = std::clamp<int64_t>(cache.slots[i], 0, cache.num_slots - 1);
    std::copy_n(cache.tables + slot * cache.table_size, cache.table_size,
                tables.data() + i * cache.table_size);
  }
  return tables;
}

// The scratch memory of a step's rows, one array after the other.
class Scratch {
 public:
  explicit Scratch(int64_t num_floats) {
    thread_local std::vector<float> kept;
    kept.resize(num_floats);
    next_ = kept.data();
  }
  float* take(int64_t num_floats) {
    float* const taken = next_;
    next_ += num_floats;
    return taken;
  }

 private:
  float* next_;
};

}  // namespace

void round_activations(const LayerCache& cache, float* values, int64_t count) {
  if (!cache.is_bfloat16) return;
  for (int64_t i = 0; i < count; i++) values[i] = as_float(to_bfloat16(values[i]));
}

void attention_half(const AttentionHalf& half, const LayerCache& cache, const float* hidden,
                    int64_t num_rows, const AttentionResult& result) {
  const int64_t width = half.query.num_in, query_width = half.query.num_out;
  const int64_t key_width = half.key.num_out;
  Scratch scratch(num_rows * (2 * width + 2 * query_width + 2 * key_width));
  float* const normed = scratch.take(num_rows * width);
  float* const attended = scratch.take(num_rows * width);
  float* const query = scratch.take(num_rows * query_width);
  float* const mixed = scratch.take(num_rows * query_width);
  float* const key = scratch.take(num_rows * key_width);
  float* const value = scratch.take(num_rows * key_width);
  {
    const Timed timed(Work::kNorm);
    each_row(num_rows, width, [&](int64_t i) {
      kernels().rms_norm(hidden + i * width, half.input_norm, width, normed + i * width);
      round_activations(cache, normed + i * width, width);
    });
  }
  {
    const Timed timed(Work::kLinear, query_width);
    linear_each(normed, num_rows,
                {{&half.query, query}, {&half.key, key}, {&half.value, value}});
  }
  {
    const Timed timed(Work::kRope);
    each_row(num_rows, 8 * query_width, [&](int64_t i) {
      const int32_t position = cache.positions[i];
      float* const own_query = query + i * query_width;
      float* const own_key = key + i * key_width;
      kernels().rope(own_query, position, half.num_heads, cache.key_size, half.frequencies,
                     own_query);
      kernels().rope(own_key, position, cache.num_kv_heads, cache.key_size, half.frequencies,
                     own_key);
      round_activations(cache, own_query, query_width);
    });
    write_rows(cache, key, value, num_rows);
  }
  {
    const Timed timed(Work::kAttention);
    const std::vector<int32_t> tables = row_tables(cache, num_rows);
    attention({query, cache.keys, cache.values, cache.is_bfloat16, cache.visible, tables.data(),
               cache.positions, num_rows, cache.num_blocks, cache.table_size, cache.block_size,
               half.num_heads, cache.num_kv_heads, cache.key_size, half.logit_scale},
              mixed);
    round_activations(cache, mixed, num_rows * query_width);
  }
  {
    const Timed timed(Work::kLinear, width);
    linear(mixed, num_rows, half.out, attended);
  }
  const Timed timed(Work::kGate);
  each_row(num_rows, width * half.num_experts, [&](int64_t i) {
    float* const row = attended + i * width;
    float* const stream = result.hidden + i * width;
    float* const input = result.expert_input + i * width;
    int32_t* const ids = result.expert_ids + i * half.num_selected;
    thread_local std::vector<float> odds;
    odds.resize(half.num_experts);
    kernels().rms_norm(row, half.output_norm, width, row);
    add_rows(hidden + i * width, row, width, stream);
    kernels().rms_norm(stream, half.expert_norm, width, input);
    // The gate gets its input before it is rounded, as in decoder.py.
    kernels().gate(input, half.gate, width, half.num_experts, half.num_selected, odds.data(), ids,
                   result.gate_weights + i * half.num_selected);
    round_activations(cache, input, width);
    if (cache.positions[i] < 0) std::fill_n(ids, half.num_selected, -1);
  });
}

void combine(const float* hidden, const float* outputs, const float* weights, const float* norm,
             int64_t num_rows, int num_ranks, int64_t width, float* out) {
  each_row(num_rows, (num_ranks + 2) * width, [&](int64_t i) {
    thread_local std::vector<float> mixed;
    mixed.resize(width);
    kernels().weigh(outputs + i * num_ranks * width, weights + i * num_ranks, num_ranks, width,
                    mixed.data());
    kernels().rms_norm(mixed.data(), norm, width, mixed.data());
    add_rows(hidden + i * width, mixed.data(), width, out + i * width);
  });
}

}  // namespace milliways
