// The interface to JAX: XLA custom calls that check shapes and pass pointers to ops.cc, and some
// plain C functions for loading and settings.
//
// A matrix has panels uint8 [*stack, panels, bytes of a panel] and scales float32
// [*stack, groups, padded columns]; attributes say the rest. A buffer of the wrong size is an error
// of the call, never an access out of bounds.
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "ffi_arrays.h"
#include "ops.h"
#include "threads.h"

namespace mw = milliways;
namespace ffi = mw::ffi;

namespace {

using mw::extent;
using mw::F32;
using mw::guarded;
using mw::invalid;
using mw::make_matrix;
using mw::make_shape;
using mw::OutF32;
using mw::OutS32;
using mw::S32;
using mw::U8;
using mw::Work;

// Memory of mapped files that the kernels may read, by number. No number is used twice, so a number
// whose file was unmapped is an error, and never means the bytes of another file.
class MappedRegions {
 public:
  int32_t add(const uint8_t* start, int64_t num_bytes) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    regions_[++last_] = {start, num_bytes};
    return last_;
  }
  void remove(int32_t number) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    regions_.erase(number);
  }
  // Held while a kernel reads.
  std::shared_lock<std::shared_mutex> lock() { return std::shared_lock(mutex_); }
  // Null if there is no such region, or if it has another size. The caller must hold the lock.
  const uint8_t* find(int32_t number, int64_t num_bytes) const {
    const auto found = regions_.find(number);
    if (found == regions_.end() || found->second.num_bytes != num_bytes) return nullptr;
    return found->second.start;
  }

 private:
  struct Region {
    const uint8_t* start;
    int64_t num_bytes;
  };
  std::shared_mutex mutex_;
  std::unordered_map<int32_t, Region> regions_;
  int32_t last_ = 0;
};

MappedRegions& mapped_regions() {
  static auto* regions = new MappedRegions;
  return *regions;
}

bool make_mapped(const S32& numbers, const F32& scales, int64_t kind, int64_t num_in,
                 int64_t num_out, int64_t stack, std::vector<const uint8_t*>& places,
                 mw::Matrix& matrix) {
  // Files have int8 weights only.
  if (kind == static_cast<int64_t>(mw::Weights::kExactInt16)) return false;
  if (!make_shape(scales, kind, num_in, num_out, stack, matrix)) return false;
  if (static_cast<int64_t>(numbers.element_count()) != stack) return false;
  for (int64_t i = 0; i < stack; i++) {
    places.push_back(mapped_regions().find(numbers.typed_data()[i], num_in * num_out));
    if (!places.back()) return false;
  }
  matrix.mapped = places.data();
  return true;
}

ffi::Error linear(F32 rows, U8 panels, F32 scales, OutF32 out, int64_t kind, int64_t num_in,
                  int64_t num_out, float multiplier) {
  mw::Matrix matrix;
  if (!make_matrix(panels, scales, kind, num_in, num_out, 1, matrix)) {
    return invalid("linear: panels or scales of another size than the matrix");
  }
  const int64_t num_rows = extent(rows, 0);
  if (extent(rows, 1) != num_in || extent(*out, 0) != num_rows || extent(*out, 1) != num_out) {
    return invalid("linear: rows do not fit the matrix");
  }
  return guarded(Work::kLinear, num_out, [&] {
    mw::linear(rows.typed_data(), num_rows, matrix, out->typed_data(), multiplier);
  });
}

bool fits(const F32& rows, const S32& ids, OutF32& out) {
  return extent(ids, 0) == extent(rows, 0) && extent(*out, 0) == extent(rows, 0) &&
         extent(*out, 1) == extent(ids, 1) && extent(*out, 2) == extent(rows, 1);
}

ffi::Error run_experts(const F32& rows, const S32& ids, const mw::Experts& experts, OutF32& out) {
  if (!fits(rows, ids, out)) return invalid("expert_ffn: ids or outputs do not fit the rows");
  return guarded(Work::kExperts, extent(rows, 1), [&] {
    mw::expert_ffn(rows.typed_data(), ids.typed_data(), extent(rows, 0),
                 static_cast<int>(extent(ids, 1)), experts, out->typed_data());
  });
}

ffi::Error expert_ffn(F32 rows, S32 ids, U8 gate, F32 gate_scales, U8 up, F32 up_scales, U8 down,
                      F32 down_scales, OutF32 out, int64_t kind, int64_t num_hidden,
                      int64_t num_experts) {
  const int64_t width = extent(rows, 1);
  mw::Experts experts;
  experts.num_experts = static_cast<int>(num_experts);
  if (!make_matrix(gate, gate_scales, kind, width, num_hidden, num_experts, experts.gate) ||
      !make_matrix(up, up_scales, kind, width, num_hidden, num_experts, experts.up) ||
      !make_matrix(down, down_scales, kind, num_hidden, width, num_experts, experts.down)) {
    return invalid("expert_ffn: panels or scales of another size than the experts");
  }
  return run_experts(rows, ids, experts, out);
}

ffi::Error expert_ffn_mapped(F32 rows, S32 ids, S32 gate, F32 gate_scales, S32 up, F32 up_scales,
                             S32 down, F32 down_scales, OutF32 out, int64_t kind,
                             int64_t num_hidden, int64_t num_experts) {
  const int64_t width = extent(rows, 1), count = num_experts;
  const auto lock = mapped_regions().lock();
  std::vector<const uint8_t*> gates, ups, downs;
  mw::Experts experts;
  experts.num_experts = static_cast<int>(num_experts);
  if (!make_mapped(gate, gate_scales, kind, width, num_hidden, count, gates, experts.gate) ||
      !make_mapped(up, up_scales, kind, width, num_hidden, count, ups, experts.up) ||
      !make_mapped(down, down_scales, kind, num_hidden, width, count, downs, experts.down)) {
    return invalid("expert_ffn: an expert is not mapped any more, or of another size");
  }
  return run_experts(rows, ids, experts, out);
}

ffi::Error attention(F32 queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::PRED> visible, S32 tables, S32 positions, OutF32 out,
                     float logit_scale) {
  mw::Attention a;
  a.is_bfloat16 = keys.element_type() == ffi::BF16;
  if (keys.element_type() != values.element_type() ||
      (!a.is_bfloat16 && keys.element_type() != ffi::F32)) {
    return invalid("attention: keys and values must both be float32 or bfloat16");
  }
  a.num_rows = extent(queries, 0);
  a.num_heads = static_cast<int>(extent(queries, 1));
  a.key_size = static_cast<int>(extent(queries, 2));
  a.num_blocks = extent(keys, 0);
  a.block_size = static_cast<int>(extent(keys, 1));
  a.num_kv_heads = static_cast<int>(extent(keys, 2));
  a.table_size = extent(tables, 1);
  if (extent(keys, 3) != a.key_size || keys.element_count() != values.element_count() || a.num_kv_heads < 1 ||
      a.num_heads % a.num_kv_heads || extent(visible, 0) != a.num_blocks ||
      extent(visible, 1) != a.block_size || extent(tables, 0) != a.num_rows ||
      extent(positions, 0) != a.num_rows ||
      static_cast<int64_t>(out->element_count()) !=
          static_cast<int64_t>(queries.element_count())) {
    return invalid("attention: the arrays do not fit each other");
  }
  a.queries = queries.typed_data();
  a.keys = keys.untyped_data();
  a.values = values.untyped_data();
  a.visible = reinterpret_cast<const uint8_t*>(visible.typed_data());
  a.tables = tables.typed_data();
  a.positions = positions.typed_data();
  a.logit_scale = logit_scale;
  return guarded(Work::kAttention, 0, [&] {
    mw::attention(a, out->typed_data());
  });
}

ffi::Error rms_norm(F32 rows, F32 scale, OutF32 out) {
  if (extent(rows, 1) != extent(scale, 0) || out->element_count() != rows.element_count()) {
    return invalid("rms_norm: the scale does not fit the rows");
  }
  return guarded(Work::kNorm, 0, [&] {
    mw::rms_norm(rows.typed_data(), scale.typed_data(), extent(rows, 0), extent(rows, 1),
               out->typed_data());
  });
}

ffi::Error gate(F32 rows, F32 gate, OutS32 ids, OutF32 weights) {
  const int64_t num_rows = extent(rows, 0), num_selected = extent(*ids, 1);
  if (extent(gate, 0) != extent(rows, 1) || extent(*ids, 0) != num_rows ||
      extent(*weights, 0) != num_rows || extent(*weights, 1) != num_selected ||
      num_selected > extent(gate, 1)) {
    return invalid("gate: the arrays do not fit each other");
  }
  return guarded(Work::kGate, 0, [&] {
    mw::gate(rows.typed_data(), gate.typed_data(), num_rows, extent(rows, 1),
           static_cast<int>(extent(gate, 1)), static_cast<int>(num_selected), ids->typed_data(),
           weights->typed_data());
  });
}

ffi::Error rope(F32 heads, S32 positions, F32 frequencies, OutF32 out) {
  const int64_t num_rows = extent(heads, 0), key_size = extent(heads, 2);
  if (extent(positions, 0) != num_rows || 2 * extent(frequencies, 0) != key_size ||
      out->element_count() != heads.element_count()) {
    return invalid("rope: the arrays do not fit each other");
  }
  return guarded(Work::kRope, 0, [&] {
    mw::rope(heads.typed_data(), positions.typed_data(), frequencies.typed_data(), num_rows,
           static_cast<int>(extent(heads, 1)), static_cast<int>(key_size), out->typed_data());
  });
}

ffi::Error weigh(F32 outputs, F32 weights, OutF32 out) {
  const int64_t num_rows = extent(outputs, 0), ranks = extent(outputs, 1);
  if (extent(weights, 0) != num_rows || extent(weights, 1) != ranks ||
      extent(*out, 0) != num_rows || extent(*out, 1) != extent(outputs, 2)) {
    return invalid("weigh: the arrays do not fit each other");
  }
  return guarded(Work::kWeigh, 0, [&] {
    mw::weigh(outputs.typed_data(), weights.typed_data(), num_rows, static_cast<int>(ranks),
            extent(outputs, 2), out->typed_data());
  });
}

ffi::Error summarize_rows(F32 rows, OutF32 tops, OutS32 best_ids, OutF32 log_totals) {
  const int64_t num_rows = extent(rows, 0);
  if (extent(rows, 1) < 1 || extent(*tops, 0) != num_rows || extent(*best_ids, 0) != num_rows ||
      extent(*log_totals, 0) != num_rows) {
    return invalid("summarize_rows: the results do not fit the rows");
  }
  return guarded(Work::kSummarize, 0, [&] {
    mw::summarize_rows(rows.typed_data(), num_rows, extent(rows, 1), tops->typed_data(),
                     best_ids->typed_data(), log_totals->typed_data());
  });
}

ffi::Error gumbel(ffi::Buffer<ffi::U32> key, OutF32 out) {
  if (key.element_count() != 2) return invalid("gumbel: a key has two words");
  return guarded(Work::kNoise, 0, [&] {
    mw::gumbel(key.typed_data(), static_cast<int64_t>(out->element_count()), out->typed_data());
  });
}

// The result has the memory of the first argument.
ffi::Error write_rows(ffi::AnyBuffer blocks, ffi::AnyBuffer rows, S32 places,
                      ffi::Result<ffi::AnyBuffer> out) {
  const int64_t num_rows = extent(rows, 0);
  const int64_t num_places = extent(blocks, 0) * extent(blocks, 1);
  if (blocks.element_type() != rows.element_type() || extent(places, 0) != num_rows ||
      extent(blocks, 2) != extent(rows, 1) || extent(blocks, 3) != extent(rows, 2) ||
      out->size_bytes() != blocks.size_bytes()) {
    return invalid("write_rows: the rows do not fit the blocks");
  }
  const mw::Timed timed(Work::kWriteRows);
  if (out->untyped_data() != blocks.untyped_data()) {
    std::memcpy(out->untyped_data(), blocks.untyped_data(), blocks.size_bytes());
  }
  const size_t row_bytes = num_places ? blocks.size_bytes() / num_places : 0;
  for (int64_t i = 0; i < num_rows; i++) {
    const int64_t place = places.typed_data()[i];
    if (place < 0 || place >= num_places) continue;
    std::memcpy(static_cast<char*>(out->untyped_data()) + place * row_bytes,
                static_cast<const char*>(rows.untyped_data()) + i * row_bytes, row_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_linear, linear,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<U8>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("num_in")
                                  .Attr<int64_t>("num_out")
                                  .Attr<float>("multiplier"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_expert_ffn, expert_ffn,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<U8>()
                                  .Arg<F32>()
                                  .Arg<U8>()
                                  .Arg<F32>()
                                  .Arg<U8>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("num_hidden")
                                  .Attr<int64_t>("num_experts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_expert_ffn_mapped, expert_ffn_mapped,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("num_hidden")
                                  .Attr<int64_t>("num_experts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_attention, attention,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<F32>()
                                  .Attr<float>("logit_scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_rms_norm, rms_norm,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_gate, gate,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Ret<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mw_rope, rope, ffi::Ffi::Bind().Arg<F32>().Arg<S32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mw_summarize_rows, summarize_rows,
    ffi::Ffi::Bind().Arg<F32>().Ret<F32>().Ret<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_gumbel, gumbel,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::U32>>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_write_rows, write_rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_weigh, weigh,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>());

extern "C" {

int32_t mw_map(const uint8_t* start, int64_t num_bytes) {
  return mapped_regions().add(start, num_bytes);
}
void mw_unmap(int32_t number) { mapped_regions().remove(number); }

// Bytes of one matrix in panels; -1 for a kind or a shape that does not exist.
int64_t mw_panel_bytes(int64_t kind, int64_t num_in, int64_t num_groups) {
  if (kind < 0 || kind > 2 || num_in < 1 || num_groups < 1 || num_in % num_groups) return -1;
  const mw::Matrix shape{static_cast<mw::Weights>(kind), nullptr, nullptr, num_in, 1,
                         static_cast<int>(num_groups)};
  return shape.panel_bytes();
}

void mw_pack(const void* matrix, int64_t kind, int64_t num_in, int64_t num_out,
             int64_t num_groups, uint8_t* panels) {
  const mw::Matrix shape{static_cast<mw::Weights>(kind), nullptr, nullptr, num_in, num_out,
                         static_cast<int>(num_groups)};
  mw::pack(matrix, shape, panels);
}

void mw_set_num_threads(int num_threads) { mw::set_num_threads(num_threads); }
int mw_num_threads() { return mw::num_threads(); }
// The digest of the sources of this build; setup.py computes it.
const char* mw_sources() { return MILLIWAYS_SOURCES; }
const char* mw_kernels() { return mw::kernels().name; }
int mw_use_kernels(const char* name) { return mw::use_kernels(name); }

}  // extern "C"
