// The text of the kernels, included once for each instruction set. See kernels.h for what each does.
#include "kernels.h"
#include "simd.h"

namespace milliways {
namespace {

// ---- products -------------------------------------------------------------------------------

// Far enough ahead that a line has arrived when the sum gets there, across the page boundaries at
// which the processor's own prefetching stops.
constexpr int kPrefetchBytes = 1024;
constexpr int kPanelVectors = kPanelColumns / kLanes;

MW_INLINE void prefetch(const void* line) {
  __builtin_prefetch(static_cast<const char*>(line) + kPrefetchBytes, 0, 3);
}

// M rows times C vectors of columns, as many as registers hold: part of a panel, or two panels.
template <int M, int C>
struct Tile {
  F8 at[M][C] = {};
};

// Where the weights of a tile lie; its vectors may span two panels.
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

// A few rows take a whole panel at once; more take it in halves, so that sums stay in registers.
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
    // Seven or eight rows as four and the rest: a lone row costs as much as three.
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
  // A single row waits for memory: two sweeps at once keep more of it on its way.
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

// Loads up to eight floats; the lanes beyond `count` are 0.
MW_INLINE F8 load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  F8 lanes = {};
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// As above, with another value in the lanes beyond.
MW_INLINE F8 load_tail(const float* from, int64_t count, float beyond) {
  if (count >= kLanes) return load(from);
  F8 lanes = broadcast(beyond);
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

MW_INLINE void store_some(float* to, F8 lanes, int64_t count) {
  std::memcpy(to, &lanes, (count < kLanes ? count : kLanes) * sizeof(float));
}

void quantise_block(const float* from, int count, int16_t* out, float* scale) {
  float top = 0.0f;
  for (int i = 0; i < count; i++) {
    const float magnitude = from[i] < 0 ? -from[i] : from[i];
    top = magnitude > top ? magnitude : top;
  }
  // NaN and infinity must not become an innocent number.
  float poison = 0.0f;
  for (int i = 0; i < count; i++) poison += from[i] * 0.0f;
  *scale = top * (1.0f / 127.0f) + poison;
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
  for (int i = 0; i < count; i += kLanes) {
    const F8 lanes = load_some(from + i, count - i);
    const I8 whole = to_int(round_even(lanes * inverse));
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
      // A chosen one is below 0; of NaNs the first unchosen is taken, and stays NaN.
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

// ---- attention ------------------------------------------------------------------------------

MW_INLINE F8 load_cached(const float* from, int64_t count) { return load_some(from, count); }

MW_INLINE F8 load_cached(const uint16_t* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(uint16_t));
  return widen(lanes);
}

// Calls visit(position, place) for every position that can be seen, in order; `place` counts
// positions of the whole cache.
template <typename Visit>
MW_INLINE void each_visible(const AttentionRow& a, Visit visit) {
  for (int64_t first = 0, entry = 0; first < a.num_keys; first += a.block_size, entry++) {
    const int64_t block = a.table[entry];
    if (block < 0 || block >= a.num_blocks) continue;
    const int64_t left = a.num_keys - first;
    const int64_t count = left < a.block_size ? left : a.block_size;
    for (int64_t i = 0; i < count; i++) {
      const int64_t place = block * a.block_size + i;
      if (a.visible[place]) visit(first + i, place);
    }
  }
}

template <typename T>
MW_INLINE const T* cached_row(const AttentionRow& a, const void* blocks, int64_t place) {
  return static_cast<const T*>(blocks) + (place * a.num_kv_heads + a.kv_head) * a.key_size;
}

// Two chains, so that an addition need not wait for the one before.
template <typename T>
MW_INLINE float dot(const float* query, const T* key, int64_t count) {
  F8 even = {}, odd = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    even = fma(load_some(query + i, count - i), load_cached(key + i, count - i), even);
    const int64_t next = i + kLanes;
    if (next >= count) break;
    odd = fma(load_some(query + next, count - next), load_cached(key + next, count - next), odd);
  }
  return sum(even + odd);
}

// Positions that cannot be seen score this, and weigh exactly 0.
constexpr float kUnseen = -1e30f;

template <typename T>
void score_keys(const AttentionRow& a, int64_t stride) {
  for (int64_t i = 0; i < a.num_heads * stride; i++) a.scores[i] = kUnseen;
  each_visible(a, [&](int64_t position, int64_t place) {
    const T* key = cached_row<T>(a, a.keys, place);
    for (int h = 0; h < a.num_heads; h++) {
      const float raw = dot(a.queries + h * a.key_size, key, a.key_size);
      a.scores[h * stride + position] = raw * a.logit_scale;
    }
  });
}

// Caps the scores and makes weights of them; returns the weights' sum.
float weigh_keys(float* scores, int64_t stride) {
  F8 tops = broadcast(kUnseen);
  for (int64_t s = 0; s < stride; s += kLanes) {
    const F8 raw = load(scores + s);
    const F8 capped = raw == kUnseen ? raw : 30.0f * tanh(raw * (1.0f / 30.0f));
    store(scores + s, capped);
    tops = larger(capped, tops);
  }
  const float top = largest(tops);
  F8 totals = {};
  for (int64_t s = 0; s < stride; s += kLanes) {
    const F8 score = load(scores + s);
    const F8 weights = score == kUnseen ? F8{} : exp(score - top);
    store(scores + s, weights);
    totals = totals + weights;
  }
  return sum(totals);
}

template <typename T>
void mix_values(const AttentionRow& a, const float* weights, float total, float* out) {
  constexpr int kColumns = 4;
  for (int64_t column = 0; column < a.key_size; column += kColumns * kLanes) {
    F8 acc[kColumns] = {};
    each_visible(a, [&](int64_t position, int64_t place) {
      const T* value = cached_row<T>(a, a.values, place) + column;
      const F8 weight = broadcast(weights[position]);
      for (int64_t c = 0; c < kColumns; c++) {
        const int64_t left = a.key_size - column - c * kLanes;
        if (left > 0) acc[c] = fma(load_cached(value + c * kLanes, left), weight, acc[c]);
      }
    });
    for (int64_t c = 0; c < kColumns; c++) {
      const int64_t left = a.key_size - column - c * kLanes;
      // Not `> 0`: a NaN must stay one.
      const F8 mixed = total == 0.0f ? F8{} : acc[c] / total;
      if (left > 0) store_some(out + column + c * kLanes, mixed, left);
    }
  }
}

template <typename T>
void attend(const AttentionRow& a) {
  const int64_t stride = (a.num_keys + kLanes - 1) / kLanes * kLanes;
  score_keys<T>(a, stride);
  for (int h = 0; h < a.num_heads; h++) {
    float* weights = a.scores + h * stride;
    const float total = weigh_keys(weights, stride);
    mix_values<T>(a, weights, total, a.out + h * a.key_size);
  }
}

void attention(const AttentionRow& a) {
  return a.is_bfloat16 ? attend<uint16_t>(a) : attend<float>(a);
}

// ---- sampling ----------------------------------------------------------------------------------

MW_INLINE Words8 rotate_left(Words8 words, int count) {
  return words << count | words >> (32 - count);
}

void summarize(const float* row, int64_t count, float* top, int32_t* best, float* log_total) {
  F8 tops = broadcast(row[0]), poison = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F8 lanes = count - i >= kLanes ? load(row + i) : load_tail(row + i, count - i, row[0]);
    tops = larger(lanes, tops);
    // NaN wins no comparison, but does not leave a sum.
    poison = poison + (lanes != lanes ? lanes : F8{});
  }
  *top = largest(tops) + sum(poison);
  F8 totals = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F8 lanes = load_tail(row + i, count - i, -HUGE_VALF);
    totals = totals + (lanes == -HUGE_VALF ? F8{} : exp(lanes - *top));
  }
  *log_total = log(broadcast(sum(totals)))[0];
  *best = 0;
  for (int64_t i = 0; i < count; i++) {
    if (row[i] == *top) {
      *best = static_cast<int32_t>(i);
      break;
    }
  }
}

// Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) of the counters (0, place), both words xored:
// what jax.random.bits gives where threefry is partitionable.
MW_INLINE Words8 random_words(const uint32_t* key, Words8 places) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  Words8 x = Words8{} + keys[0], y = places + keys[1];
  for (int round = 0; round < 5; round++) {
    for (const int rotation : kRotations[round % 2]) {
      x += y;
      y = rotate_left(y, rotation) ^ x;
    }
    x += keys[(round + 1) % 3];
    y += keys[(round + 2) % 3] + static_cast<uint32_t>(round + 1);
  }
  return x ^ y;
}

void gumbel(const uint32_t* key, uint32_t first, int64_t count, float* out) {
  const Words8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const F8 largest = broadcast(0x1.fffffep-1f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Words8 words = random_words(key, lanes + (first + static_cast<uint32_t>(i)));
    const F8 uniform = (to_float_unsigned(words) + 0.5f) * 0x1p-32f;
    const F8 exponential = minus_log1m(uniform < largest ? uniform : largest);
    store_some(out + i, -log(exponential), count - i);
  }
}

}  // namespace

const Kernels* MILLIWAYS_KERNELS() {
  static const Kernels kernels = {MILLIWAYS_NAME, product, quantise, gelu_times, rms_norm,
                                  gate,           rope,    weigh,    attention,  summarize, gumbel};
  return &kernels;
}

}  // namespace milliways
