// What the custom calls of ffi.cc and halves_ffi.cc share: checks of shapes, and errors.
#pragma once

#include <exception>
#include <string>

#include "ops.h"
#include "trace.h"
#include "xla/ffi/api/ffi.h"

namespace milliways {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U8 = ffi::Buffer<ffi::U8>;
using OutF32 = ffi::Result<F32>;
using OutS32 = ffi::Result<S32>;

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument(what); }

// No exception may cross XLA's C interface: if memory runs out, the call fails.
template <typename Body>
ffi::Error guarded_whole(const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
  }
}

// The same, logged as one piece of work.
template <typename Body>
ffi::Error guarded(Work work, int64_t width, const Body& body) {
  const Timed timed(work, width);
  return guarded_whole(body);
}

template <typename B>
int64_t extent(const B& buffer, size_t axis) {
  return axis < buffer.dimensions().size() ? buffer.dimensions()[axis] : 0;
}

// A matrix without its weights, from the shape of its scales; `stack` is the number of matrices.
inline bool make_shape(const F32& scales, int64_t kind, int64_t num_in, int64_t num_out,
                       int64_t stack, Matrix& matrix) {
  const auto& shape = scales.dimensions();
  if (shape.size() < 2 || num_in < 1 || num_out < 1 || kind < 0 || kind > 2) return false;
  const int64_t num_groups = shape[shape.size() - 2];
  if (num_groups < 1 || num_in % num_groups) return false;
  matrix = {static_cast<Weights>(kind), nullptr, scales.typed_data(),
            num_in, num_out, static_cast<int>(num_groups)};
  return static_cast<int64_t>(scales.element_count()) ==
         stack * num_groups * matrix.scale_stride();
}

inline bool make_matrix(const U8& panels, const F32& scales, int64_t kind, int64_t num_in,
                        int64_t num_out, int64_t stack, Matrix& matrix) {
  if (!make_shape(scales, kind, num_in, num_out, stack, matrix)) return false;
  matrix.panels = panels.typed_data();
  return static_cast<int64_t>(panels.element_count()) ==
         stack * matrix.num_panels() * matrix.panel_bytes();
}

}  // namespace milliways
