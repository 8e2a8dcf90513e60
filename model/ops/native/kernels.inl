// The source of the kernels, included once for each instruction set. kernels.h says what each does.
#include "kernels.h"
#include "simd.h"

namespace milliways {
namespace {

// ---- products -------------------------------------------------------------------------------

// Far enough ahead that a cache line arrives before the sum needs it. The processor's own
// prefetching stops at page boundaries; this one does not.
constexpr int kPrefetchBytes = 1024;
constexpr int kPanelVectors = kPanelColumns / kLanes;

MW_INLINE void prefetch(const void* line) {
  __builtin_prefetch(static_cast<const char*>(line) + kPrefetchBytes, 0, 3);
}

// M rows times C vectors of columns, as many as fit into registers: part of a panel, or two panels.
template <int M, int C>
struct Tile {
  F8 at[M][C] = {};
};

// The place of the weights of a tile. Its vectors may belong to two panels.
template <typename W, int C>
struct TileWeights {
  static constexpr int kNumPanels = C > kPanelVectors ? C / kPanelVectors : 1;
  const W* panels[kNumPanels];

  TileWeights(const PanelProduct& p, int64_t column, int columns_wide) {
    const int64_t panel = column / kPanelColumns;
    for (int i = 0; i < kNumPanels; i++) {
      panels[i] = reinterpret_cast<const W*>(p.panels + (panel + i) * p.panel_bytes) +
                  column % kPanelColumns * columns_wide;
    }
  }
  MW_INLINE_MEMBER const W* line(int64_t offset, int c, int lanes_wide) const {
    return panels[c / kPanelVectors] + offset + c % kPanelVectors * lanes_wide;
  }
  MW_INLINE_MEMBER void prefetch_line(int64_t offset) const {
    for (int i = 0; i < kNumPanels; i++) prefetch(panels[i] + offset);
  }
};

template <int M, int C>
MW_INLINE void add_group(const PanelProduct& p, int g, int64_t column, const Tile<M, C>& group,
                         Tile<M, C>& total) {
  for (int c = 0; c < C; c++) {
    const F8 scale = load(p.scales + g * p.scale_stride + column + c * kLanes);
    for (int m = 0; m < M; m++) total.at[m][c] = fma(group.at[m][c], scale, total.at[m][c]);
  }
}

template <int M, int C>
MW_INLINE void write_tile(const PanelProduct& p, int row, int64_t column,
                          const Tile<M, C>& total) {
  const int64_t num_left = p.num_columns - column;
  const int64_t num_here = num_left < C * kLanes ? num_left : C * kLanes;
  if (num_here <= 0) return;
  for (int m = 0; m < M; m++) {
    float line[C * kLanes];
    for (int c = 0; c < C; c++) store(line + c * kLanes, total.at[m][c]);
    std::memcpy(p.out[row + m] + p.out_column + column, line, num_here * sizeof(float));
  }
}

template <typename W>
struct Exact {
  static constexpr int kMaxWideRows = 3;

  template <int M, int C>
  static void run(const PanelProduct& p, int row, int64_t column) {
    const float* rows[M];
    for (int m = 0; m < M; m++) rows[m] = static_cast<const float*>(p.rows[row + m]);
    const TileWeights<W, C> weights(p, column, 1);
    Tile<M, C> total;
    int64_t k = 0;
    for (int g = 0; g < p.num_groups; g++) {
      Tile<M, C> acc;
      for (const int64_t end = k + p.group_rows; k < end; k++) {
        const int64_t line = k * kPanelColumns;
        weights.prefetch_line(line);
        if constexpr (C > 2) {
          F8 x[M];
          for (int m = 0; m < M; m++) x[m] = broadcast(rows[m][k]);
          for (int c = 0; c < C; c++) {
            const F8 w = widen(weights.line(line, c, kLanes));
            for (int m = 0; m < M; m++) acc.at[m][c] = fma(w, x[m], acc.at[m][c]);
          }
        } else {
          F8 w[C];
          for (int c = 0; c < C; c++) w[c] = widen(weights.line(line, c, kLanes));
          for (int m = 0; m < M; m++) {
            const F8 x = broadcast(rows[m][k]);
            for (int c = 0; c < C; c++) acc.at[m][c] = fma(w[c], x, acc.at[m][c]);
          }
        }
      }
      add_group(p, g, column, acc, total);
    }
    write_tile(p, row, column, total);
  }
};

struct Pairs {
  static constexpr int kMaxWideRows = 2;

  template <int M, int C>
  static void run(const PanelProduct& p, int row, int64_t column) {
    const int64_t group_pairs = (p.group_rows + 1) / 2;
    const int16_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = static_cast<const int16_t*>(p.rows[row + m]);
    const TileWeights<int8_t, C> weights(p, column, 2);
    Tile<M, C> total;
    int64_t pair = 0, block = 0;
    for (int g = 0; g < p.num_groups; g++) {
      Tile<M, C> acc;
      for (const int64_t group_end = pair + group_pairs; pair < group_end; block++) {
        const int64_t full_end = pair + kQuantBlock / 2;
        const int64_t end = full_end < group_end ? full_end : group_end;
        I8 whole[M][C] = {};
        for (; pair < end; pair++) add_pair<M, C>(rows, weights, pair, whole);
        for (int m = 0; m < M; m++) {
          const F8 scale = broadcast(p.row_scales[row + m][block]);
          for (int c = 0; c < C; c++) {
            acc.at[m][c] = fma(to_float(whole[m][c]), scale, acc.at[m][c]);
          }
        }
      }
      add_group(p, g, column, acc, total);
    }
    write_tile(p, row, column, total);
  }

  template <int M, int C>
  MW_INLINE void add_pair(const int16_t* const* rows, const TileWeights<int8_t, C>& weights,
                          int64_t pair, I8 (&whole)[M][C]) {
    const int64_t line = pair * 2 * kPanelColumns;
    weights.prefetch_line(line);
    if constexpr (M == 1) {
      const Pairs8 x = broadcast_pair(rows[0] + 2 * pair);
      for (int c = 0; c < C; c++) {
        const Pairs8 w = load_pairs(weights.line(line, c, 2 * kLanes));
        whole[0][c] = add_products(w, x, whole[0][c]);
      }
      return;
    }
    Pairs8 w[C];
    for (int c = 0; c < C; c++) w[c] = load_pairs(weights.line(line, c, 2 * kLanes));
    for (int m = 0; m < M; m++) {
      const Pairs8 x = broadcast_pair(rows[m] + 2 * pair);
      for (int c = 0; c < C; c++) whole[m][c] = add_products(w[c], x, whole[m][c]);
    }
  }
};

// Few rows use a whole panel at once. More rows use it in halves, so that sums stay in registers.
template <typename Kind, int M>
void run_rows(const PanelProduct& p, int row, int64_t column) {
  if constexpr (M <= Kind::kMaxWideRows) {
    Kind::template run<M, kPanelVectors>(p, row, column);
  } else {
    Kind::template run<M, kPanelVectors / 2>(p, row, column);
    Kind::template run<M, kPanelVectors / 2>(p, row, column + kPanelColumns / 2);
  }
}

template <typename Kind>
void multiply_panel(const PanelProduct& p, int64_t column) {
  constexpr int kMaxRows = 6;
  int row = 0;
  while (row < p.num_rows) {
    const int left = p.num_rows - row;
    // Seven or eight rows are computed as four and the rest: one row takes as long as three.
    const int now = left == 7 || left == 8 ? 4 : left < kMaxRows ? left : kMaxRows;
    switch (now) {
      case 1: run_rows<Kind, 1>(p, row, column); break;
      case 2: run_rows<Kind, 2>(p, row, column); break;
      case 3: run_rows<Kind, 3>(p, row, column); break;
      case 4: run_rows<Kind, 4>(p, row, column); break;
      case 5: run_rows<Kind, 5>(p, row, column); break;
      default: run_rows<Kind, 6>(p, row, column); break;
    }
    row += now;
  }
}

template <typename Kind>
void product_of(const PanelProduct& p) {
  int panel = 0;
  // A single row waits for memory. Reading two panels at the same time keeps more loads in flight.
  for (; p.num_rows == 1 && panel + 1 < p.num_panels; panel += 2) {
    Kind::template run<1, 2 * kPanelVectors>(p, 0, panel * int64_t{kPanelColumns});
  }
  for (; panel < p.num_panels; panel++) {
    multiply_panel<Kind>(p, panel * int64_t{kPanelColumns});
  }
}

void product(Weights kind, const PanelProduct& p) {
  switch (kind) {
    case Weights::kExactInt8: return product_of<Exact<int8_t>>(p);
    case Weights::kExactInt16: return product_of<Exact<int16_t>>(p);
    case Weights::kPairs: return product_of<Pairs>(p);
  }
}

// ---- rows -----------------------------------------------------------------------------------

// Loads up to eight floats; the lanes from `count` on are 0.
MW_INLINE F8 load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  F8 lanes = {};
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// As above, with another value in the lanes from `count` on.
MW_INLINE F8 load_tail(const float* from, int64_t count, float beyond) {
  if (count >= kLanes) return load(from);
  F8 lanes = broadcast(beyond);
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

MW_INLINE void store_some(float* to, F8 lanes, int64_t count) {
  std::memcpy(to, &lanes, (count < kLanes ? count : kLanes) * sizeof(float));
}

// A block counts as zeros if its largest value is below this: 127 / largest would not be finite.
constexpr float kLeastBlock = 1e-30f;

void quantise_block(const float* from, int count, int16_t* out, float* scale) {
  float top = 0.0f;
  for (int i = 0; i < count; i++) {
    const float magnitude = from[i] < 0 ? -from[i] : from[i];
    top = magnitude > top ? magnitude : top;
  }
  // NaN and infinity must not become finite numbers.
  float poison = 0.0f;
  for (int i = 0; i < count; i++) poison += from[i] * 0.0f;
  const bool is_sound = poison == 0.0f && top >= kLeastBlock;
  *scale = (top >= kLeastBlock ? top * (1.0f / 127.0f) : 0.0f) + poison;
  const float inverse = is_sound ? 127.0f / top : 0.0f;
  for (int i = 0; i < count; i += kLanes) {
    const F8 lanes = load_some(from + i, count - i);
    const I8 whole = is_sound ? to_int(round_even(lanes * inverse)) : I8{};
    for (int j = 0; j < kLanes && i + j < count; j++) {
      out[i + j] = static_cast<int16_t>(whole[j]);
    }
  }
}

void quantise(const float* row, int64_t group_rows, int num_groups, int16_t* out, float* scales) {
  for (int g = 0; g < num_groups; g++) {
    for (int64_t k = 0; k < group_rows; k += kQuantBlock) {
      const int64_t left = group_rows - k;
      quantise_block(row + k, static_cast<int>(left < kQuantBlock ? left : kQuantBlock), out + k,
                     scales++);
    }
    row += group_rows;
    out += group_rows;
    if (group_rows % 2) *out++ = 0;
  }
}

void gelu_times(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const F8 product = gelu(load_some(gate + i, count - i)) * load_some(up + i, count - i);
    store_some(gate + i, product, count - i);
  }
}

void rms_norm(const float* row, const float* scale, int64_t count, float* out) {
  F8 squares = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F8 lanes = load_some(row + i, count - i);
    squares = fma(lanes, lanes, squares);
  }
  const float mean = sum(squares) / static_cast<float>(count);
  const float factor = 1.0f / __builtin_sqrtf(mean + 1e-5f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const F8 lanes = load_some(row + i, count - i) * factor;
    store_some(out + i, lanes * load_some(scale + i, count - i), count - i);
  }
}

void softmax(float* values, int count) {
  float top = values[0];
  for (int i = 1; i < count; i++) top = values[i] > top ? values[i] : top;
  float total = 0.0f;
  for (int i = 0; i < count; i += kLanes) {
    const F8 weights = exp(load_some(values + i, count - i) - top);
    store_some(values + i, weights, count - i);
  }
  for (int i = 0; i < count; i++) total += values[i];
  for (int i = 0; i < count; i++) values[i] /= total;
}

void gate(const float* row, const float* gate, int64_t num_in, int num_experts, int num_selected,
          float* scratch, int32_t* ids, float* weights) {
  for (int e = 0; e < num_experts; e += kLanes) {
    F8 logits = {};
    for (int64_t k = 0; k < num_in; k++) {
      const F8 column = load_some(gate + k * num_experts + e, num_experts - e);
      logits = fma(column, broadcast(row[k]), logits);
    }
    store_some(scratch + e, logits, num_experts - e);
  }
  softmax(scratch, num_experts);
  for (int rank = 0; rank < num_selected; rank++) {
    int best = -1;
    for (int e = 0; e < num_experts; e++) {
      // A chosen expert is below 0. Of several NaNs, the first that is not chosen is taken.
      if (scratch[e] < 0.0f) continue;
      if (best < 0 || scratch[e] > scratch[best]) best = e;
    }
    ids[rank] = best;
    weights[rank] = scratch[best];
    scratch[best] = -1.0f;
  }
}

// Sine and cosine of an angle: reduced and summed in double (fdlibm's polynomials), then rounded.
void sincos(float angle, float* sine, float* cosine) {
  const double x = angle;
  const double quarter = x * 0.63661977236758134308;
  const int64_t n = static_cast<int64_t>(quarter + (quarter < 0 ? -0.5 : 0.5));
  const double y = (x - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11;
  const double z = y * y;
  const double s =
      y + y * z * (-1.66666666666666324348e-01 +
                   z * (8.33333333332248946124e-03 +
                        z * (-1.98412698298579493134e-04 +
                             z * (2.75573137070700676789e-06 +
                                  z * (-2.50507602534068634195e-08 +
                                       z * 1.58969099521155010221e-10)))));
  const double c = 1.0 - 0.5 * z +
                   z * z * (4.16666666666666019037e-02 +
                            z * (-1.38888888888741095749e-03 +
                                 z * (2.48015872894767294178e-05 +
                                      z * (-2.75573143513906633035e-07 +
                                           z * (2.08757232129817482790e-09 +
                                                z * -1.13596475577881948265e-11)))));
  const double sines[4] = {s, c, -s, -c}, cosines[4] = {c, -s, -c, s};
  *sine = static_cast<float>(sines[n & 3]);
  *cosine = static_cast<float>(cosines[n & 3]);
}

void rope(const float* heads, int32_t position, int num_heads, int key_size,
          const float* frequencies, float* out) {
  const int half = key_size / 2;
  for (int i = 0; i < half; i++) {
    float sine, cosine;
    sincos(static_cast<float>(position) * frequencies[i], &sine, &cosine);
    for (int h = 0; h < num_heads; h++) {
      const float low = heads[h * key_size + i], high = heads[h * key_size + half + i];
      out[h * key_size + i] = fma(low, cosine, -(high * sine));
      out[h * key_size + half + i] = fma(high, cosine, low * sine);
    }
  }
}

void weigh(const float* outputs, const float* weights, int num_ranks, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    F8 total = {};
    for (int rank = 0; rank < num_ranks; rank++) {
      const F8 lanes = load_some(outputs + rank * count + i, count - i);
      total = fma(lanes, broadcast(weights[rank]), total);
    }
    store_some(out + i, total, count - i);
  }
}

#include "attention.inl"
#include "sampling.inl"

}  // namespace

const Kernels* MILLIWAYS_KERNELS() {
  static const Kernels kernels = {MILLIWAYS_NAME, product, quantise, gelu_times, rms_norm,
                                  gate,           rope,    weigh,    attention,  find_tops, top_of,
                                  add_exponentials, log_total, gumbel};
  return &kernels;
}

}  // namespace milliways
