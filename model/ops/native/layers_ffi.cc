// The interface of layers.h: a custom call, and plain C functions that native_layers.py calls.
//
// Addresses come from Python, which has checked the arrays. The sizes of what a step brings are
// checked here: keys, values and batch.
#include <cstring>
#include <utility>
#include <vector>

#include "ffi_arrays.h"
#include "halves_ffi.h"
#include "layers.h"

namespace mw = milliways;
namespace ffi = mw::ffi;

namespace {

using mw::extent;
using mw::F32;
using mw::invalid;
using mw::OutF32;
using mw::S32;

// The arguments end with the keys and values of each layer, and so do the results.
ffi::Error layers(F32 hidden, S32 number, mw::Bools visible, S32 tables, S32 slots, S32 positions,
                  ffi::RemainingArgs blocks, OutF32 out, ffi::RemainingRets out_blocks) {
  const auto lock = mw::lock_layers();
  const mw::Layers* const held =
      number.element_count() == 1 ? mw::find_layers(number.typed_data()[0]) : nullptr;
  if (!held) return invalid("layers: the parameters are not held any more");
  const int64_t num_rows = extent(hidden, 0);
  const size_t num_layers = held->each.size();
  if (blocks.size() != 2 * num_layers || out_blocks.size() != 2 * num_layers ||
      extent(hidden, 1) != held->width || extent(positions, 0) != num_rows ||
      out->element_count() != hidden.element_count()) {
    return invalid("layers: the arrays do not fit the model");
  }
  std::vector<mw::LayerCache> caches(num_layers);
  for (size_t i = 0; i < num_layers; i++) {
    const auto keys = blocks.get<ffi::AnyBuffer>(2 * i);
    const auto values = blocks.get<ffi::AnyBuffer>(2 * i + 1);
    auto out_keys = out_blocks.get<ffi::AnyBuffer>(2 * i);
    auto out_values = out_blocks.get<ffi::AnyBuffer>(2 * i + 1);
    if (!keys || !values || !out_keys || !out_values ||
        !mw::make_cache(*keys, *values, visible, tables, slots, positions, *out_keys, *out_values,
                        caches[i]) ||
        caches[i].num_kv_heads != held->num_kv_heads || caches[i].key_size != held->key_size) {
      return invalid("layers: keys, values and batch do not fit each other");
    }
    mw::keep(*keys, *out_keys);
    mw::keep(*values, *out_values);
  }
  if (out->typed_data() != hidden.typed_data()) {
    std::memcpy(out->typed_data(), hidden.typed_data(), hidden.size_bytes());
  }
  return mw::guarded_whole([&] { mw::run_layers(*held, caches, num_rows, out->typed_data()); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_layers, layers,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()         // hidden
                                  .Arg<S32>()         // number
                                  .Arg<mw::Bools>()   // visible
                                  .Arg<S32>()         // tables
                                  .Arg<S32>()         // slots
                                  .Arg<S32>()         // positions
                                  .RemainingArgs()    // keys and values of each layer
                                  .Ret<F32>()
                                  .RemainingRets());

extern "C" {

// The fields are in the order of the declarations in native_layers.py.
struct mw_matrix {
  const uint8_t* panels;
  const float* scales;
  int64_t kind, num_in, num_out, num_groups;
};
struct mw_layer {
  const float* norms[4];  // before attention, after it, before the experts, after them
  const float* gate;
  mw_matrix matrices[7];  // query, key, value, out; gate, up, down of the experts
};
struct mw_layer_sizes {
  int64_t width, num_heads, num_kv_heads, key_size, num_experts, num_selected;
  const float* frequencies;
  float logit_scale;
};

int64_t mw_hold_layers(const mw_layer* layers, int64_t count, const mw_layer_sizes* sizes) {
  const auto matrix = [](const mw_matrix& m) {
    return mw::Matrix{static_cast<mw::Weights>(m.kind), m.panels, m.scales, m.num_in, m.num_out,
                      static_cast<int>(m.num_groups)};
  };
  mw::Layers held;
  held.width = sizes->width;
  held.num_heads = static_cast<int>(sizes->num_heads);
  held.num_kv_heads = static_cast<int>(sizes->num_kv_heads);
  held.key_size = static_cast<int>(sizes->key_size);
  for (int64_t i = 0; i < count; i++) {
    const mw_layer& from = layers[i];
    const auto* m = from.matrices;
    const mw::AttentionHalf attention{
        from.norms[0], from.norms[1], from.norms[2], matrix(m[0]), matrix(m[1]), matrix(m[2]),
        matrix(m[3]), from.gate, sizes->frequencies, held.num_heads,
        static_cast<int>(sizes->num_experts), static_cast<int>(sizes->num_selected),
        sizes->logit_scale};
    const mw::Experts experts{matrix(m[4]), matrix(m[5]), matrix(m[6]),
                              static_cast<int>(sizes->num_experts)};
    held.each.push_back({attention, experts, from.norms[3]});
  }
  return mw::hold_layers(std::move(held));
}

// Waits for a step that runs; then the owner may free the arrays.
void mw_drop_layers(int64_t number) { mw::drop_layers(number); }

}  // extern "C"
