// What the custom calls of halves_ffi.cc and layers_ffi.cc share: the arrays of keys and values.
#pragma once

#include <cstring>

#include "ffi_arrays.h"
#include "halves.h"

namespace milliways {

using Bools = ffi::Buffer<ffi::PRED>;
using OutAny = ffi::Result<ffi::AnyBuffer>;

// The results have the memory of keys and values, or get a copy.
inline void keep(const ffi::AnyBuffer& blocks, OutAny& out) {
  if (out->untyped_data() == blocks.untyped_data()) return;
  std::memcpy(out->untyped_data(), blocks.untyped_data(), blocks.size_bytes());
}

inline bool make_cache(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values, const Bools& visible,
                const S32& tables, const S32& slots, const S32& positions, OutAny& out_keys,
                OutAny& out_values, LayerCache& cache) {
  cache.is_bfloat16 = keys.element_type() == ffi::BF16;
  if (!cache.is_bfloat16 && keys.element_type() != ffi::F32) return false;
  cache.keys = out_keys->untyped_data();
  cache.values = out_values->untyped_data();
  cache.visible = reinterpret_cast<const uint8_t*>(visible.typed_data());
  cache.tables = tables.typed_data();
  cache.slots = slots.typed_data();
  cache.positions = positions.typed_data();
  cache.num_blocks = extent(keys, 0);
  cache.block_size = static_cast<int>(extent(keys, 1));
  cache.num_kv_heads = static_cast<int>(extent(keys, 2));
  cache.key_size = static_cast<int>(extent(keys, 3));
  cache.num_slots = extent(tables, 0);
  cache.table_size = extent(tables, 1);
  return cache.num_slots > 0 && cache.num_kv_heads > 0 && cache.block_size > 0 &&
         values.element_type() == keys.element_type() &&
         values.size_bytes() == keys.size_bytes() &&
         out_keys->size_bytes() == keys.size_bytes() &&
         out_values->size_bytes() == keys.size_bytes() &&
         extent(visible, 0) == cache.num_blocks && extent(visible, 1) == cache.block_size &&
         extent(slots, 0) == extent(positions, 0);
}

}  // namespace milliways
