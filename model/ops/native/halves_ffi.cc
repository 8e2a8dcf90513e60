// The custom calls for whole halves of a layer (halves.h). ffi.cc has the other ones.
#include "ffi_arrays.h"
#include "halves.h"
#include "halves_ffi.h"

namespace mw = milliways;
namespace ffi = mw::ffi;

namespace {

using mw::Bools;
using mw::extent;
using mw::F32;
using mw::invalid;
using mw::keep;
using mw::make_cache;
using mw::make_matrix;
using mw::OutAny;
using mw::OutF32;
using mw::OutS32;
using mw::S32;
using mw::U8;

ffi::Error attention_half(F32 hidden, F32 input_norm, F32 output_norm, F32 expert_norm, U8 query,
                          F32 query_scales, U8 key, F32 key_scales, U8 value, F32 value_scales,
                          U8 out, F32 out_scales, F32 gate, F32 frequencies, ffi::AnyBuffer keys,
                          ffi::AnyBuffer values, Bools visible, S32 tables, S32 slots,
                          S32 positions, OutF32 stream, OutF32 expert_input, OutS32 ids,
                          OutF32 weights, OutAny out_keys, OutAny out_values, int64_t kind,
                          int64_t num_heads, float logit_scale) {
  mw::LayerCache cache;
  if (!make_cache(keys, values, visible, tables, slots, positions, out_keys, out_values, cache)) {
    return invalid("attention_half: keys, values and batch do not fit each other");
  }
  const int64_t num_rows = extent(hidden, 0), width = extent(hidden, 1);
  const int64_t query_width = num_heads * cache.key_size;
  const int64_t key_width = int64_t{cache.num_kv_heads} * cache.key_size;
  mw::AttentionHalf half;
  if (!make_matrix(query, query_scales, kind, width, query_width, 1, half.query) ||
      !make_matrix(key, key_scales, kind, width, key_width, 1, half.key) ||
      !make_matrix(value, value_scales, kind, width, key_width, 1, half.value) ||
      !make_matrix(out, out_scales, kind, query_width, width, 1, half.out)) {
    return invalid("attention_half: panels or scales of another size than the matrices");
  }
  const int64_t num_experts = extent(gate, 1), num_selected = extent(*ids, 1);
  if (num_heads % cache.num_kv_heads || extent(positions, 0) != num_rows ||
      extent(input_norm, 0) != width || extent(output_norm, 0) != width ||
      extent(expert_norm, 0) != width || extent(gate, 0) != width ||
      num_selected > num_experts || 2 * extent(frequencies, 0) != cache.key_size ||
      stream->element_count() != hidden.element_count() ||
      expert_input->element_count() != hidden.element_count() ||
      extent(*ids, 0) != num_rows || weights->element_count() != ids->element_count()) {
    return invalid("attention_half: the arrays do not fit each other");
  }
  half.input_norm = input_norm.typed_data();
  half.output_norm = output_norm.typed_data();
  half.expert_norm = expert_norm.typed_data();
  half.gate = gate.typed_data();
  half.frequencies = frequencies.typed_data();
  half.num_heads = static_cast<int>(num_heads);
  half.num_experts = static_cast<int>(num_experts);
  half.num_selected = static_cast<int>(num_selected);
  half.logit_scale = logit_scale;
  keep(keys, out_keys);
  keep(values, out_values);
  return mw::guarded_whole([&] {
    mw::attention_half(half, cache, hidden.typed_data(), num_rows,
                       {stream->typed_data(), expert_input->typed_data(), ids->typed_data(),
                        weights->typed_data()});
  });
}

ffi::Error combine(F32 hidden, F32 outputs, F32 weights, F32 norm, OutF32 out) {
  const int64_t num_rows = extent(hidden, 0), width = extent(hidden, 1);
  const int64_t num_ranks = extent(outputs, 1);
  if (extent(outputs, 0) != num_rows || extent(outputs, 2) != width ||
      extent(weights, 0) != num_rows || extent(weights, 1) != num_ranks ||
      extent(norm, 0) != width || out->element_count() != hidden.element_count()) {
    return invalid("combine: the arrays do not fit each other");
  }
  return mw::guarded(mw::Work::kWeigh, 0, [&] {
    mw::combine(hidden.typed_data(), outputs.typed_data(), weights.typed_data(),
                norm.typed_data(), num_rows, static_cast<int>(num_ranks), width,
                out->typed_data());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_attention_half, attention_half,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()   // hidden
                                  .Arg<F32>()   // input norm
                                  .Arg<F32>()   // output norm
                                  .Arg<F32>()   // expert norm
                                  .Arg<U8>()    // query
                                  .Arg<F32>()
                                  .Arg<U8>()    // key
                                  .Arg<F32>()
                                  .Arg<U8>()    // value
                                  .Arg<F32>()
                                  .Arg<U8>()    // out
                                  .Arg<F32>()
                                  .Arg<F32>()   // gate
                                  .Arg<F32>()   // frequencies
                                  .Arg<ffi::AnyBuffer>()  // keys
                                  .Arg<ffi::AnyBuffer>()  // values
                                  .Arg<Bools>()           // visible
                                  .Arg<S32>()   // tables
                                  .Arg<S32>()   // slots
                                  .Arg<S32>()   // positions
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<S32>()
                                  .Ret<F32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("num_heads")
                                  .Attr<float>("logit_scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mw_combine, combine,
    ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>());
