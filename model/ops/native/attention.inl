// Attention of one row over the blocks of its sequence; part of kernels.inl.

MW_INLINE F8 load_cached(const float* from, int64_t count) { return load_some(from, count); }

MW_INLINE F8 load_cached(const uint16_t* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(uint16_t));
  return widen(lanes);
}

// Finds the index in the whole cache of each position that the row sees, and -1 for the others.
void find_places(const AttentionRow& a) {
  for (int64_t first = 0, entry = 0; first < a.num_keys; first += a.block_size, entry++) {
    const int64_t block = a.table[entry];
    const int64_t left = a.num_keys - first;
    const int64_t count = left < a.block_size ? left : a.block_size;
    const bool is_known = block >= 0 && block < a.num_blocks;
    for (int64_t i = 0; i < count; i++) {
      const int64_t place = block * a.block_size + i;
      a.places[first + i] = is_known && a.visible[place] ? place : -1;
    }
  }
}

template <typename T>
MW_INLINE const T* cached_row(const AttentionRow& a, const void* blocks, int64_t place) {
  return static_cast<const T*>(blocks) + (place * a.num_kv_heads + a.kv_head) * a.key_size;
}

// Two chains of sums, so that an addition need not wait for the one before.
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

// The same for a multiple of 16: without the cases of a last, smaller vector.
template <typename T>
MW_INLINE float dot_whole(const float* query, const T* key, int64_t count) {
  F8 even = {}, odd = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    even = fma(load(query + i), load_cached(key + i, kLanes), even);
    odd = fma(load(query + i + kLanes), load_cached(key + i + kLanes, kLanes), odd);
  }
  return sum(even + odd);
}

// The score of positions that are not visible; their weight is exactly 0.
constexpr float kUnseen = -1e30f;
constexpr int64_t kCacheLine = 64;

// A row of a block is short, and rows of other heads lie between: the processor does not foresee it.
template <typename T>
MW_INLINE void prefetch_row(const AttentionRow& a, const void* blocks, int64_t position) {
  if (position >= a.num_keys || a.places[position] < 0) return;
  const char* row = reinterpret_cast<const char*>(cached_row<T>(a, blocks, a.places[position]));
  const int64_t num_bytes = a.key_size * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < num_bytes; i += kCacheLine) __builtin_prefetch(row + i, 0, 3);
}

template <typename T>
void score_keys(const AttentionRow& a, int64_t stride) {
  // So many rows are on their way that one is there when it is needed.
  constexpr int64_t kRowsAhead = 8;
  for (int64_t position = 0; position < kRowsAhead; position++) {
    prefetch_row<T>(a, a.keys, position);
  }
  const bool is_whole = a.key_size % (2 * kLanes) == 0;
  for (int64_t i = 0; i < a.num_heads * stride; i++) a.scores[i] = kUnseen;
  for (int64_t position = 0; position < a.num_keys; position++) {
    prefetch_row<T>(a, a.keys, position + kRowsAhead);
    // Values are needed next.
    prefetch_row<T>(a, a.values, position);
    if (a.places[position] < 0) continue;
    const T* key = cached_row<T>(a, a.keys, a.places[position]);
    for (int h = 0; h < a.num_heads; h++) {
      const float* query = a.queries + h * a.key_size;
      const float raw = is_whole ? dot_whole(query, key, a.key_size) : dot(query, key, a.key_size);
      a.scores[h * stride + position] = raw * a.logit_scale;
    }
  }
}

// Caps the scores and turns them into weights; returns the sum of the weights.
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

// Some vectors of columns of the weighted sum; `kColumns` of them are whole.
template <typename T, int kColumns>
MW_INLINE void mix_columns(const AttentionRow& a, const float* weights, float total,
                           int64_t column, float* out) {
  F8 acc[kColumns] = {};
  for (int64_t position = 0; position < a.num_keys; position++) {
    if (a.places[position] < 0) continue;
    const T* value = cached_row<T>(a, a.values, a.places[position]) + column;
    const F8 weight = broadcast(weights[position]);
    for (int c = 0; c < kColumns; c++) {
      acc[c] = fma(load_cached(value + c * kLanes, kLanes), weight, acc[c]);
    }
  }
  for (int c = 0; c < kColumns; c++) {
    // Not `> 0`: a NaN must stay NaN.
    store(out + column + c * kLanes, total == 0.0f ? F8{} : acc[c] / total);
  }
}

// The last columns, fewer than a vector.
template <typename T>
void mix_rest(const AttentionRow& a, const float* weights, float total, int64_t column,
              float* out) {
  const int64_t count = a.key_size - column;
  F8 acc = {};
  for (int64_t position = 0; position < a.num_keys; position++) {
    if (a.places[position] < 0) continue;
    const T* value = cached_row<T>(a, a.values, a.places[position]) + column;
    acc = fma(load_cached(value, count), broadcast(weights[position]), acc);
  }
  store_some(out + column, total == 0.0f ? F8{} : acc / total, count);
}

template <typename T>
void mix_values(const AttentionRow& a, const float* weights, float total, float* out) {
  int64_t column = 0;
  for (; column + 8 * kLanes <= a.key_size; column += 8 * kLanes) {
    mix_columns<T, 8>(a, weights, total, column, out);
  }
  for (; column + 2 * kLanes <= a.key_size; column += 2 * kLanes) {
    mix_columns<T, 2>(a, weights, total, column, out);
  }
  for (; column + kLanes <= a.key_size; column += kLanes) {
    mix_columns<T, 1>(a, weights, total, column, out);
  }
  if (column < a.key_size) mix_rest<T>(a, weights, total, column, out);
}

template <typename T>
void attend(const AttentionRow& a) {
  const int64_t stride = (a.num_keys + kLanes - 1) / kLanes * kLanes;
  find_places(a);
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
