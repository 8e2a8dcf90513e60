#include "ops.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <vector>

#include "threads.h"

namespace milliways {
namespace {

// A task should take tens of microseconds. In a shorter one, the start costs too much (reading
// memory takes some time to reach its full speed). With longer ones, threads wait for the last
// task.
constexpr int64_t kMinTaskBytes = 48 * 1024;
constexpr int64_t kMaxTaskBytes = 512 * 1024;
constexpr int64_t kTasksPerThread = 8;
// A small matrix is cut for all threads if this much is left for each task.
constexpr int64_t kLeastTaskBytes = 16 * 1024;
// This many neighbouring columns of a mapped matrix are packed together: 512 bytes of each row.
constexpr int64_t kMappedPanels = 16;
// This many rows share one read of a panel. Their activations fit into the second-level cache.
constexpr int64_t kTaskRows = 96;
// Limits the hidden activations of experts, the largest intermediate result.
constexpr int64_t kPassRows = 512;

const Kernels* best_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return portable_kernels();
}

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen{best_kernels()};
  return chosen;
}

// The rows in the form that the kernels of a matrix need: unchanged, or quantised once for all
// panels.
class Activations {
 public:
  Activations(const float* rows, int64_t num_rows, const Matrix& m)
      : pointers_(num_rows), scale_pointers_(num_rows) {
    if (m.kind != Weights::kPairs) {
      for (int64_t i = 0; i < num_rows; i++) pointers_[i] = rows + i * m.num_in;
      return;
    }
    const int64_t width = m.num_groups * ((m.group_rows() + 1) / 2) * 2;
    const int64_t num_blocks =
        m.num_groups * ((m.group_rows() + kQuantBlock - 1) / kQuantBlock);
    whole_.resize(num_rows * width);
    scales_.resize(num_rows * num_blocks);
    run_tasks(static_cast<int>((num_rows + 7) / 8), [&](int task) {
      const int64_t end = std::min<int64_t>(num_rows, 8 * (task + 1));
      for (int64_t i = 8 * static_cast<int64_t>(task); i < end; i++) {
        kernels().quantise(rows + i * m.num_in, m.group_rows(), m.num_groups,
                           &whole_[i * width], &scales_[i * num_blocks]);
        pointers_[i] = &whole_[i * width];
        scale_pointers_[i] = &scales_[i * num_blocks];
      }
    });
  }

  const void* row(int64_t i) const { return pointers_[i]; }
  const float* scales(int64_t i) const { return scale_pointers_[i]; }

 private:
  std::vector<int16_t> whole_;
  std::vector<float> scales_;
  std::vector<const void*> pointers_;
  std::vector<const float*> scale_pointers_;
};

// Some rows, by number, and the places of their results.
struct Rows {
  std::vector<const void*> in;
  std::vector<const float*> in_scales;
  std::vector<float*> out;

  void add(const Activations& activations, int64_t row, float* to) {
    in.push_back(activations.row(row));
    in_scales.push_back(activations.scales(row));
    out.push_back(to);
  }
};

// A run of panels for a run of rows.
struct Piece {
  int64_t group;  // identifies matrix and rows; the caller chooses the numbers
  int64_t first_panel, last_panel, first_row, last_row;
};

// Copies the columns of some panels, panel by panel, in the order of the released rows.
void pack_panels(const void* matrix, const Matrix& shape, int64_t first, int64_t last,
                 uint8_t* to) {
  const int64_t item = shape.kind == Weights::kExactInt16 ? 2 : 1;
  const int64_t group_rows = shape.group_rows(), padded_rows = (group_rows + 1) / 2 * 2;
  // Padding is zero: in the last panel's columns, and in a group with an odd number of rows.
  const bool is_padded = last * kPanelColumns > shape.num_out || padded_rows != group_rows;
  if (is_padded) std::memset(to, 0, (last - first) * shape.panel_bytes());
  for (int64_t k = 0; k < shape.num_in; k++) {
    const auto* row = static_cast<const uint8_t*>(matrix) + k * shape.num_out * item;
    const int64_t place = k / group_rows * padded_rows + k % group_rows;
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t column = panel * kPanelColumns;
      const int64_t count = std::min<int64_t>(kPanelColumns, shape.num_out - column);
      uint8_t* const start = to + (panel - first) * shape.panel_bytes();
      if (shape.kind == Weights::kExactInt8 && count == kPanelColumns) {
        // The compiler knows the size of this copy. It takes most of the time of a mapped expert.
        std::memcpy(start + k * kPanelColumns, row + column, kPanelColumns);
        continue;
      }
      if (shape.kind != Weights::kPairs) {
        std::memcpy(start + k * kPanelColumns * item, row + column * item, count * item);
        continue;
      }
      uint8_t* const line = start + place / 2 * 2 * kPanelColumns + place % 2;
      for (int64_t n = 0; n < count; n++) line[2 * n] = row[column + n];
    }
  }
}

// The panels of a piece: those in memory, or packed into this thread's scratch memory.
const uint8_t* panels_of(const Matrix& m, const Piece& piece) {
  if (!m.mapped) return m.panels + piece.first_panel * m.panel_bytes();
  thread_local std::vector<uint8_t> scratch;
  scratch.resize((piece.last_panel - piece.first_panel) * m.panel_bytes());
  pack_panels(*m.mapped, m, piece.first_panel, piece.last_panel, scratch.data());
  return scratch.data();
}

// Multiplies the rows of a piece with its panels. `out` has, for each row of the piece, the place
// of column `origin` of the matrix.
void multiply(const Matrix& m, const Piece& piece, const Rows& rows, float* const* out,
              int64_t origin) {
  const int64_t column = piece.first_panel * kPanelColumns;
  kernels().product(
      m.kind,
      {rows.in.data() + piece.first_row, rows.in_scales.data() + piece.first_row, out,
       column - origin, static_cast<int>(piece.last_row - piece.first_row), panels_of(m, piece),
       m.panel_bytes(), static_cast<int>(piece.last_panel - piece.first_panel), m.group_rows(),
       m.num_groups, m.scales + column, m.scale_stride(), m.num_out - column});
}

// Panels of a task of about `step` panels. The tasks of a matrix are of one size, and as many as a
// multiple of the threads, so that no thread waits for the last one. A single row reads two panels
// at once.
int64_t even_step(const Matrix& m, int64_t num_rows, int64_t step) {
  const int64_t num_panels = m.num_panels(), threads = num_threads();
  const int64_t num_tasks = (num_panels + step - 1) / step;
  const int64_t rounded = (num_tasks + threads - 1) / threads * threads;
  int64_t even = (num_panels + rounded - 1) / rounded;
  if (even * m.panel_bytes() < kLeastTaskBytes) even = step;
  return num_rows == 1 ? (even + 1) / 2 * 2 : even;
}

void cut(int64_t group, const Matrix& m, int64_t num_rows, std::vector<Piece>& pieces) {
  const int64_t share = m.num_panels() * m.panel_bytes() / (kTasksPerThread * num_threads());
  const int64_t task_bytes = std::clamp(share, kMinTaskBytes, kMaxTaskBytes);
  // With this many rows, arithmetic takes longer than reading.
  const int64_t cost = m.panel_bytes() * std::max<int64_t>(1, std::min(num_rows, kTaskRows) / 4);
  const int64_t fit = std::max<int64_t>(1, task_bytes / std::max<int64_t>(1, cost));
  const int64_t step = m.mapped ? std::max(fit, kMappedPanels) : even_step(m, num_rows, fit);
  for (int64_t row = 0; row < num_rows; row += kTaskRows) {
    for (int64_t panel = 0; panel < m.num_panels(); panel += step) {
      pieces.push_back({group, panel, std::min(panel + step, m.num_panels()), row,
                        std::min(row + kTaskRows, num_rows)});
    }
  }
}

// The assignments (token, rank) of each expert, in the order of the tokens.
std::vector<std::vector<int64_t>> group_by_expert(const int32_t* ids, int64_t count,
                                                  int num_experts) {
  std::vector<std::vector<int64_t>> groups(num_experts);
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] >= 0 && ids[i] < num_experts) groups[ids[i]].push_back(i);
  }
  return groups;
}

// Tells the operating system to read a chosen expert's weights in large pieces, in the background.
void fetch(const Matrix& m) {
  if (!m.mapped) return;
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const auto start = reinterpret_cast<uintptr_t>(*m.mapped);
  const uintptr_t first = start / page * page;
  madvise(reinterpret_cast<void*>(first), start + m.num_in * m.num_out - first, MADV_WILLNEED);
}

void hidden_piece(const Experts& experts, const Piece& piece, const Rows& gate_rows,
                  const Rows& up_rows) {
  const Matrix gate = experts.gate.of_stack(piece.group), up = experts.up.of_stack(piece.group);
  const int64_t column = piece.first_panel * kPanelColumns;
  const int64_t width = std::min(piece.last_panel * kPanelColumns, gate.num_out) - column;
  const int64_t num_rows = piece.last_row - piece.first_row;
  thread_local std::vector<float> up_values;
  up_values.resize(num_rows * width);
  float* up_out[kTaskRows];
  for (int64_t i = 0; i < num_rows; i++) up_out[i] = up_values.data() + i * width;
  float* const* gate_out = gate_rows.out.data() + piece.first_row;
  multiply(gate, piece, gate_rows, gate_out, 0);
  multiply(up, piece, up_rows, up_out, column);
  for (int64_t i = 0; i < num_rows; i++) {
    kernels().gelu_times(gate_out[i] + column, up_out[i], width);
  }
}

void expert_pass(const float* rows, const int32_t* ids, int64_t num_rows, int num_selected,
                 const Experts& experts, float* out) {
  const int64_t num_hidden = experts.gate.num_out, width = experts.down.num_out;
  const auto groups = group_by_expert(ids, num_rows * num_selected, experts.num_experts);
  thread_local std::vector<float> hidden;
  std::vector<int64_t> places;
  for (const auto& group : groups) places.insert(places.end(), group.begin(), group.end());
  hidden.resize(places.size() * num_hidden);
  float* const hidden_rows = hidden.data();

  const Activations for_gate(rows, num_rows, experts.gate);
  const bool alike = experts.up.num_groups == experts.gate.num_groups;
  const Activations for_up(rows, alike ? 0 : num_rows, experts.up);
  std::vector<Rows> gate_rows(groups.size()), up_rows(groups.size()), down_rows(groups.size());
  std::vector<Piece> pieces;
  int64_t place = 0;
  for (size_t e = 0; e < groups.size(); e++) {
    for (const int64_t assignment : groups[e]) {
      const int64_t token = assignment / num_selected;
      gate_rows[e].add(for_gate, token, hidden_rows + place++ * num_hidden);
      up_rows[e].add(alike ? for_gate : for_up, token, nullptr);
    }
    cut(e, experts.gate, groups[e].size(), pieces);
    if (groups[e].empty()) continue;
    for (const Matrix* m : {&experts.gate, &experts.up, &experts.down}) fetch(m->of_stack(e));
  }
  run_tasks(static_cast<int>(pieces.size()), [&](int i) {
    hidden_piece(experts, pieces[i], gate_rows[pieces[i].group], up_rows[pieces[i].group]);
  });

  const Activations for_down(hidden_rows, places.size(), experts.down);
  pieces.clear();
  place = 0;
  for (size_t e = 0; e < groups.size(); e++) {
    for (const int64_t assignment : groups[e]) {
      down_rows[e].add(for_down, place++, out + assignment * width);
    }
    cut(e, experts.down, groups[e].size(), pieces);
  }
  run_tasks(static_cast<int>(pieces.size()), [&](int i) {
    const Piece& piece = pieces[i];
    const Rows& rows = down_rows[piece.group];
    multiply(experts.down.of_stack(piece.group), piece, rows, rows.out.data() + piece.first_row, 0);
  });
}

}  // namespace

const Kernels& kernels() { return *chosen_kernels().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  for (const Kernels* set : {best_kernels(), portable_kernels()}) {
    if (std::strcmp(set->name, name) == 0) {
      chosen_kernels().store(set);
      return true;
    }
  }
  return false;
}

void linear(const float* rows, int64_t num_rows, const Matrix& matrix, float* out,
            float multiplier) {
  linear_each(rows, num_rows, {{&matrix, out, multiplier}});
}

void linear_each(const float* rows, int64_t num_rows, const std::vector<Product>& products) {
  std::deque<Activations> kept;
  std::vector<Rows> all(products.size());
  std::vector<Piece> pieces;
  for (size_t p = 0; p < products.size(); p++) {
    const Matrix& matrix = *products[p].matrix;
    const bool alike = p > 0 && matrix.num_groups == products[p - 1].matrix->num_groups;
    if (!alike) kept.emplace_back(rows, num_rows, matrix);
    for (int64_t i = 0; i < num_rows; i++) {
      all[p].add(kept.back(), i, products[p].out + i * matrix.num_out);
    }
    cut(p, matrix, num_rows, pieces);
  }
  run_tasks(static_cast<int>(pieces.size()), [&](int i) {
    const Piece& piece = pieces[i];
    const Product& product = products[piece.group];
    float* const* out = all[piece.group].out.data();
    multiply(*product.matrix, piece, all[piece.group], out + piece.first_row, 0);
    if (product.multiplier == 1.0f) return;
    const int64_t end = std::min(piece.last_panel * kPanelColumns, product.matrix->num_out);
    for (int64_t row = piece.first_row; row < piece.last_row; row++) {
      for (int64_t n = piece.first_panel * kPanelColumns; n < end; n++) {
        out[row][n] *= product.multiplier;
      }
    }
  });
}

void expert_ffn(const float* rows, const int32_t* ids, int64_t num_rows, int num_selected,
                const Experts& experts, float* out) {
  const int64_t width = experts.down.num_out;
  // Assignments to experts of other shards stay zero.
  std::fill_n(out, num_rows * num_selected * width, 0.0f);
  for (int64_t first = 0; first < num_rows; first += kPassRows) {
    const int64_t count = std::min(kPassRows, num_rows - first);
    expert_pass(rows + first * experts.gate.num_in, ids + first * num_selected, count,
                num_selected, experts, out + first * num_selected * width);
  }
}

void attention(const Attention& a, float* out) {
  const int group = a.num_heads / a.num_kv_heads;
  const int64_t row_size = static_cast<int64_t>(a.num_heads) * a.key_size;
  run_tasks(static_cast<int>(a.num_rows * a.num_kv_heads), [&](int task) {
    const int64_t row = task / a.num_kv_heads;
    const int kv_head = task % a.num_kv_heads;
    const int64_t capacity = a.table_size * a.block_size;
    const int64_t num_keys = std::clamp<int64_t>(a.positions[row] + 1, 0, capacity);
    const int64_t first = row * row_size + static_cast<int64_t>(kv_head) * group * a.key_size;
    thread_local std::vector<float> scores;
    thread_local std::vector<int64_t> places;
    scores.resize(group * ((num_keys + 7) / 8 * 8));
    places.resize(num_keys);
    kernels().attention({a.queries + first, a.keys, a.values, a.is_bfloat16, a.visible,
                         a.tables + row * a.table_size, a.num_blocks, num_keys, a.block_size,
                         a.num_kv_heads, kv_head, group, a.key_size, a.logit_scale,
                         scores.data(), places.data(), out + first});
  });
}

void rms_norm(const float* rows, const float* scale, int64_t num_rows, int64_t width, float* out) {
  each_row(num_rows, width, [&](int64_t i) {
    kernels().rms_norm(rows + i * width, scale, width, out + i * width);
  });
}

void gate(const float* rows, const float* gate, int64_t num_rows, int64_t width, int num_experts,
          int num_selected, int32_t* ids, float* weights) {
  each_row(num_rows, width * num_experts, [&](int64_t i) {
    thread_local std::vector<float> scratch;
    scratch.resize(num_experts);
    kernels().gate(rows + i * width, gate, width, num_experts, num_selected, scratch.data(),
                   ids + i * num_selected, weights + i * num_selected);
  });
}

void rope(const float* heads, const int32_t* positions, const float* frequencies,
          int64_t num_rows, int num_heads, int key_size, float* out) {
  const int64_t width = static_cast<int64_t>(num_heads) * key_size;
  each_row(num_rows, 8 * width, [&](int64_t i) {
    kernels().rope(heads + i * width, positions[i], num_heads, key_size, frequencies,
                   out + i * width);
  });
}

void weigh(const float* outputs, const float* weights, int64_t num_rows, int num_ranks,
           int64_t width, float* out) {
  each_row(num_rows, num_ranks * width, [&](int64_t i) {
    kernels().weigh(outputs + i * num_ranks * width, weights + i * num_ranks, num_ranks, width,
                    out + i * width);
  });
}

namespace {

// The place of a row's highest value: that of the first piece that has one.
int32_t first_of(const RowPiece* pieces, int64_t num_pieces) {
  for (int64_t i = 0; i < num_pieces; i++) {
    if (pieces[i].best >= 0) return static_cast<int32_t>(i * kSummaryPiece + pieces[i].best);
  }
  return 0;
}

}  // namespace

void summarize_rows(const float* rows, int64_t num_rows, int64_t width, float* tops,
                    int32_t* best_ids, float* log_totals) {
  // A row is read in pieces, by all threads, even if it is the only one.
  const int64_t num_pieces = (width + kSummaryPiece - 1) / kSummaryPiece;
  const int num_tasks = static_cast<int>(num_rows * num_pieces);
  thread_local std::vector<RowPiece> kept;
  kept.resize(num_tasks);
  RowPiece* const pieces = kept.data();
  const auto each_piece = [&](const auto& body) {
    run_tasks(num_tasks, [&](int task) {
      const int64_t row = task / num_pieces, first = task % num_pieces * kSummaryPiece;
      body(row, rows + row * width, first, std::min(kSummaryPiece, width - first), pieces[task]);
    });
  };
  each_piece([](int64_t, const float* row, int64_t first, int64_t count, RowPiece& piece) {
    kernels().find_tops(row, first, count, &piece);
  });
  for (int64_t i = 0; i < num_rows; i++) {
    tops[i] = kernels().top_of(pieces + i * num_pieces, num_pieces);
  }
  each_piece([&](int64_t i, const float* row, int64_t first, int64_t count, RowPiece& piece) {
    kernels().add_exponentials(row + first, count, tops[i], &piece);
  });
  for (int64_t i = 0; i < num_rows; i++) {
    best_ids[i] = first_of(pieces + i * num_pieces, num_pieces);
    log_totals[i] = kernels().log_total(pieces + i * num_pieces, num_pieces);
  }
}

void gumbel(const uint32_t* key, int64_t count, float* out) {
  constexpr int64_t kStep = 8 * 1024;
  run_tasks(static_cast<int>((count + kStep - 1) / kStep), [&](int task) {
    const int64_t first = task * kStep;
    kernels().gumbel(key, static_cast<uint32_t>(first), std::min(kStep, count - first),
                     out + first);
  });
}

void pack(const void* matrix, const Matrix& shape, uint8_t* panels) {
  run_tasks(static_cast<int>(shape.num_panels()), [&](int panel) {
    pack_panels(matrix, shape, panel, panel + 1, panels + panel * shape.panel_bytes());
  });
}

}  // namespace milliways
