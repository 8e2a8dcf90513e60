// The operations of a layer over many rows. They are divided into tasks, which the pool runs.
// interface.py says what each computes. All arrays are in C order. Scratch memory is kept for the
// next call.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace milliways {

// A matrix, or a stack of matrices, in panels (kernels.h), or as int8 [in, out] in mapped files,
// with one address for each matrix. The latter are packed piece by piece on every use. That is
// slower, but needs nothing in memory before.
struct Matrix {
  Weights kind;
  const uint8_t* panels;
  const float* scales;
  int64_t num_in, num_out;
  int num_groups;
  const uint8_t* const* mapped = nullptr;

  int64_t num_panels() const { return (num_out + kPanelColumns - 1) / kPanelColumns; }
  int64_t group_rows() const { return num_in / num_groups; }
  int64_t panel_bytes() const {
    switch (kind) {
      case Weights::kExactInt8: return num_in * kPanelColumns;
      case Weights::kExactInt16: return num_in * kPanelColumns * 2;
      case Weights::kPairs: return num_groups * ((group_rows() + 1) / 2) * 2 * kPanelColumns;
    }
    return 0;
  }
  int64_t scale_stride() const { return num_panels() * kPanelColumns; }
  Matrix of_stack(int64_t index) const {
    Matrix one = *this;
    if (mapped) one.mapped += index;
    else one.panels += index * num_panels() * panel_bytes();
    one.scales += index * num_groups * scale_stride();
    return one;
  }
};

struct Experts {
  Matrix gate, up, down;
  int num_experts;
};

struct Attention {
  const float* queries;  // [T, H, K]
  const void* keys;      // [N, P, R, K]
  const void* values;
  bool is_bfloat16;
  const uint8_t* visible;    // [N, P]
  const int32_t* tables;     // [T, M]
  const int32_t* positions;  // [T]
  int64_t num_rows, num_blocks, table_size;
  int block_size, num_heads, num_kv_heads, key_size;
  float logit_scale;
};

// A matrix to multiply rows with, and the place of the result, which is times `multiplier`.
struct Product {
  const Matrix* matrix;
  float* out;
  float multiplier = 1.0f;
};

void linear(const float* rows, int64_t num_rows, const Matrix& matrix, float* out,
            float multiplier = 1.0f);
// Several products with the same rows, which the threads share as one. All are of one kind.
void linear_each(const float* rows, int64_t num_rows, const std::vector<Product>& products);
void expert_ffn(const float* rows, const int32_t* ids, int64_t num_rows, int num_selected,
                const Experts& experts, float* out);
void attention(const Attention& a, float* out);
void rms_norm(const float* rows, const float* scale, int64_t num_rows, int64_t width, float* out);
void gate(const float* rows, const float* gate, int64_t num_rows, int64_t width, int num_experts,
          int num_selected, int32_t* ids, float* weights);
void rope(const float* heads, const int32_t* positions, const float* frequencies,
          int64_t num_rows, int num_heads, int key_size, float* out);
void weigh(const float* outputs, const float* weights, int64_t num_rows, int num_ranks,
           int64_t width, float* out);

void summarize_rows(const float* rows, int64_t num_rows, int64_t width, float* tops,
                    int32_t* best_ids, float* log_totals);

// Gumbel noise of places 0 .. count - 1 under a threefry key of two words.
void gumbel(const uint32_t* key, int64_t count, float* out);

// Copies a matrix [num_in, num_out] of int8 or int16, with contiguous rows, into panels.
void pack(const void* matrix, const Matrix& shape, uint8_t* panels);

// The kernels in use: the best that this processor can run, unless others were chosen.
const Kernels& kernels();
bool use_kernels(const char* name);

}  // namespace milliways
