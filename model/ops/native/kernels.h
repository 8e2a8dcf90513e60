// The kernels: each works on one row, or on one panel of a matrix, in one thread. ops.cc divides
// the work and gives it to threads. There is one table of kernels for each instruction set.
//
// A matrix [K, N] is stored in panels of 32 columns; the last one is padded with zeros:
//   exact   [N/32][K][32]        int8 or int16 weights, float32 activations
//   int8    [N/32][G][ceil(K/G/2)][32][2]   int8 weights in pairs of rows of one scale group
// Scales are float32 [G, N padded]: row k of the matrix belongs to group k / (K/G).
#pragma once

#include <cstdint>

namespace milliways {

constexpr int kPanelColumns = 32;
constexpr int kQuantBlock = 32;

enum class Weights { kExactInt8, kExactInt16, kPairs };

// Rows times a run of panels: out[i][out_column + n] = rows[i] @ panels[:, n], scaled.
//
// exact: a chain of fused multiply-adds over the rows of each group, then the group's scale.
// pairs: exact whole-number sums over blocks of 32 rows, each times its activation scale, in the
//        same kind of chain.
// K and G fix the order of the sums of an element; other rows and columns do not matter.
struct PanelProduct {
  const void* const* rows;         // float32 [K], or int16 [G, 2 * ceil(K/G/2)]
  const float* const* row_scales;  // pairs only: [G, ceil(K/G/32)]
  float* const* out;
  int64_t out_column;  // the column of `out` for the first panel's first column
  int num_rows;
  const uint8_t* panels;
  int64_t panel_bytes;
  int num_panels;
  int64_t group_rows;  // K / G
  int num_groups;      // G
  const float* scales;  // of the first panel's first column
  int64_t scale_stride;
  int64_t num_columns;  // columns of the matrix, from the first panel's first column on
};

// One query row of one key/value head over its sequence's blocks.
struct AttentionRow {
  const float* queries;  // [heads, key_size], the query heads that share this key/value head
  const void* keys;      // [N, P, R, K] float32 or bfloat16
  const void* values;
  bool is_bfloat16;
  const uint8_t* visible;  // [N, P]
  const int32_t* table;    // block ids of the sequence
  int64_t num_blocks;      // N
  int64_t num_keys;        // positions 0 .. num_keys - 1 are read
  int block_size, num_kv_heads, kv_head, num_heads, key_size;
  float logit_scale;
  float* scores;    // scratch: heads * (num_keys rounded up to 8)
  int64_t* places;  // scratch: num_keys
  float* out;     // [heads, key_size]
};

// What is known of some neighbouring values of a row of logits; lanes are those of simd.h.
constexpr int64_t kSummaryRun = 512;
constexpr int64_t kSummaryPiece = 16 * kSummaryRun;
struct RowPiece {
  float tops[8], poison[8];
  // Two levels: a single sum over a vocabulary would lose four of seven digits.
  float runs[kSummaryPiece / kSummaryRun][8];
  int num_runs;
  int32_t best;  // the first place of the row's highest value; -1 if it is not in this piece
};

struct Kernels {
  const char* name;
  void (*product)(Weights, const PanelProduct&);
  // Turns one row [G, group_rows] into pairs and scales, in blocks of 32 within a group.
  void (*quantise)(const float* row, int64_t group_rows, int num_groups, int16_t* out,
                   float* scales);
  // gate <- gelu(gate) * up
  void (*gelu_times)(float* gate, const float* up, int64_t count);
  void (*rms_norm)(const float* row, const float* scale, int64_t count, float* out);
  // Softmax over all experts, then the best `num_selected`, ties to the lower id.
  void (*gate)(const float* row, const float* gate, int64_t num_in, int num_experts,
               int num_selected, float* scratch, int32_t* ids, float* weights);
  // Rotates two halves; frequencies [key_size / 2] are in radians per position.
  void (*rope)(const float* heads, int32_t position, int num_heads, int key_size,
               const float* frequencies, float* out);
  // sum over ranks of outputs[rank] * weights[rank], in the order of the ranks
  void (*weigh)(const float* outputs, const float* weights, int num_ranks, int64_t count,
                float* out);
  void (*attention)(const AttentionRow&);
  // In this order: the highest value of a row (infinity if there is a NaN) and its first place,
  // and log(sum of exp(value - highest)). Pieces are independent, and combined in their order.
  void (*find_tops)(const float* row, int64_t first, int64_t count, RowPiece* piece);
  float (*top_of)(const RowPiece* pieces, int64_t num_pieces);
  void (*add_exponentials)(const float* values, int64_t count, float top, RowPiece* piece);
  float (*log_total)(const RowPiece* pieces, int64_t num_pieces);
  // Gumbel noise of places first .. first + count - 1 under a threefry key; see sampling.py.
  void (*gumbel)(const uint32_t* key, uint32_t first, int64_t count, float* out);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null if this build has none

}  // namespace milliways
