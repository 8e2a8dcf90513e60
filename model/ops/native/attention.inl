// Attention of one row over the blocks of its sequence; part of kernels.inl.

MW_INLINE F8 load_cached(const float* from, int64_t count) { return load_some(from, count); }

MW_INLINE F8 load_cached(const uint16_t* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(uint16_t));
  return widen(lanes);
}

// Calls visit(position, place) for every visible position, in order; `place` is the position's
// index in the whole cache.
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

// The score of positions that are not visible; their weight is exactly 0.
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
      // Not `> 0`: a NaN must stay NaN.
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
