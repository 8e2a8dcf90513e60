// The parts of sampling that read a whole row of logits; part of kernels.inl.

MW_INLINE Words8 rotate_left(Words8 words, int count) {
  return words << count | words >> (32 - count);
}

void find_tops(const float* row, int64_t first, int64_t count, RowPiece* piece) {
  F8 tops = broadcast(row[0]), poison = {};
  for (int64_t i = first; i < first + count; i += kLanes) {
    const F8 lanes = load_tail(row + i, first + count - i, row[0]);
    tops = larger(lanes, tops);
    // Every comparison with NaN is false, but a sum with NaN is NaN.
    poison = poison + (lanes != lanes ? lanes : F8{});
  }
  store(piece->tops, tops);
  store(piece->poison, poison);
}

float top_of(const RowPiece* pieces, int64_t num_pieces) {
  F8 tops = load(pieces[0].tops), poison = load(pieces[0].poison);
  for (int64_t i = 1; i < num_pieces; i++) {
    tops = larger(load(pieces[i].tops), tops);
    poison = poison + load(pieces[i].poison);
  }
  return sum(poison) == 0.0f ? largest(tops) : HUGE_VALF;
}

int32_t first_place_of(const float* values, int64_t count, float value) {
  for (int64_t i = 0; i < count; i++) {
    if (values[i] == value) return static_cast<int32_t>(i);
  }
  return -1;
}

void add_exponentials(const float* values, int64_t count, float top, RowPiece* piece) {
  piece->num_runs = 0;
  F8 tops = broadcast(-HUGE_VALF);
  for (int64_t first = 0; first < count; first += kSummaryRun) {
    F8 run = {};
    for (int64_t i = first; i < count && i < first + kSummaryRun; i += kLanes) {
      const F8 lanes = load_tail(values + i, count - i, -HUGE_VALF);
      run = run + (lanes == -HUGE_VALF ? F8{} : exp(lanes - top));
      tops = larger(lanes, tops);
    }
    store(piece->runs[piece->num_runs++], run);
  }
  // Only the piece that holds the highest value is searched.
  const bool is_here = largest(tops) == top;
  piece->best = is_here ? first_place_of(values, count, top) : -1;
}

float log_total(const RowPiece* pieces, int64_t num_pieces) {
  F8 totals = {};
  for (int64_t i = 0; i < num_pieces; i++) {
    for (int run = 0; run < pieces[i].num_runs; run++) totals = totals + load(pieces[i].runs[run]);
  }
  return log(broadcast(sum(totals)))[0];
}

// Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) of the counters (0, place), with both words
// xored. jax.random.bits gives the same bits if threefry is partitionable.
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
