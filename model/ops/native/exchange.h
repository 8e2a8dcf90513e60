// A router's side: within one compiled step, sends each layer's rows to the workers with the chosen
// experts, and puts their outputs into the places of the gate's ranking.
//
// It decides nothing. A plan, made in Python, says where the experts of each layer are. If a worker
// dies, refuses, is late, or if nobody is planned for an expert, the exchange reports the places
// that are missing, and waits until Python has filled them or has given the batch up.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "expert_server.h"
#include "expert_table.h"
#include "rings.h"

namespace milliways {

// Targets of a plan: an expert that Python dispatches, one of this process, or the number of a link.
constexpr int64_t kByPython = -1, kHere = 0;

// A ring to one worker, and which of its slots are in use.
class Link {
 public:
  Link(int64_t id, Ring ring, std::shared_ptr<Peer> peer, uint64_t incarnation)
      : id(id), incarnation(incarnation), ring(std::move(ring)), peer(std::move(peer)),
        uses_(this->ring.shape.num_slots, Use::kFree),
        sequences_(this->ring.shape.num_slots) {}
  const int64_t id;
  const uint64_t incarnation;
  const Ring ring;
  const std::shared_ptr<Peer> peer;
  std::atomic<bool> is_lost{false};
  // How long an answer may take before Python is asked.
  std::atomic<int64_t> patience_ns{0};

  // A slot that is free, or whose late answer has come; -1 if there is none.
  int acquire();
  // The answer was taken, or nobody needs it.
  void release(int slot);
  // The number of calls that a slot has had.
  int64_t sequence(int slot);
  // Whether a call whose slot was released has still not been answered.
  bool is_unanswered(int slot, int64_t sequence);
  void note_answer(int64_t took_ns);
  // The longest answer since the last call of this, and how many there were.
  void take_latency(int64_t& longest_ns, int64_t& num_answers);

 private:
  enum class Use { kFree, kTaken, kAbandoned };
  std::mutex mutex_;
  std::vector<Use> uses_;
  std::vector<int64_t> sequences_;
  int64_t longest_ns_ = 0, num_answers_ = 0;
};

// Where the experts of each layer are.
struct Plan {
  uint64_t placement_epoch = 0;
  std::vector<int64_t> targets;  // [layers, experts]
  std::unordered_map<int64_t, std::shared_ptr<Link>> links;
};

enum class CallState : int32_t { kOpen = 0, kAnswered = 1, kRefused = 2, kLost = 3 };

// A call of one layer to one worker.
struct RowsCall {
  std::shared_ptr<Link> link;
  int slot;
  std::vector<int32_t> places;  // numbers of [num_rows, num_selected], in increasing order
  int64_t asked_ns;
  CallState state = CallState::kOpen;
  uint32_t status = 0;
  uint64_t placement_epoch = 0;
};

// One layer of a step.
struct LayerRows {
  int layer;
  int64_t num_rows;
  const uint8_t* rows;   // [num_rows, width]
  const int32_t* ids;    // [num_rows, num_selected]
  uint8_t* out;          // [num_rows, num_selected, width]
};

// What is missing of a layer, for Python. All of it stays valid until `number` is resumed.
struct Missing {
  int64_t number = 0, batch = 0;
  LayerRows layer{};
  std::vector<RowsCall> calls;
  std::vector<uint8_t> is_filled;  // [num_rows * num_selected]
  bool is_resumed = false;
};

class Exchange {
 public:
  // `event_fd` is written whenever Python should look at `missing`. It is duplicated: a thread may
  // still be in an exchange when the caller has closed its own, and another file has the number.
  Exchange(std::shared_ptr<ExpertTable> table, ExpertServer& server, const Bell& bell,
           int event_fd)
      : table_(std::move(table)), server_(server), bell_(bell),
        event_fd_(fcntl(event_fd, F_DUPFD_CLOEXEC, 0)) {}
  ~Exchange() { close(event_fd_); }
  Exchange(const Exchange&) = delete;
  bool can_notify() const { return event_fd_ >= 0; }

  int64_t open_link(Ring ring, std::shared_ptr<Peer> peer, uint64_t incarnation);
  // Calls in flight are lost; nothing is read or written there after they have ended.
  void close_link(int64_t id);
  std::shared_ptr<Link> link(int64_t id);
  void set_plan(uint64_t placement_epoch, const int64_t* targets);

  // A batch begins; the numbers of batches grow. If it is cautious, Python dispatches everything.
  void begin(int64_t batch, bool is_cautious);
  void end();
  // Nobody needs this batch or one before it: their exchanges return zeros at once.
  void give_up(int64_t batch);
  // Fills the outputs of a layer; with zeros once the batch is given up. If it cannot go on, for
  // lack of memory, the process ends: a step that failed would lose all keys and values, while
  // other processes can go on with the streams of one that is gone.
  void run(const LayerRows& layer) noexcept;

  // For Python. `inspect` is called under a lock with what is missing, or with null.
  template <typename Inspect>
  void with_missing(const Inspect& inspect) {
    std::lock_guard<std::mutex> lock(mutex_);
    inspect(missing_.get());
  }
  // Both are without effect if another layer is missing by now.
  void fill(int64_t number, const int32_t* places, int64_t count, const uint8_t* rows);
  void resume(int64_t number);

 private:
  bool is_given_up() const { return given_up_ >= batch_; }
  void ask(const LayerRows& layer, const Plan& plan, std::vector<RowsCall>& calls,
           std::vector<uint8_t>& is_filled, std::vector<int32_t>& own_ids);
  bool write_call(const LayerRows& layer, const Plan& plan, RowsCall& call);
  // Looks at an open call; returns whether its state changed.
  bool look(const LayerRows& layer, RowsCall& call, std::vector<uint8_t>& is_filled);
  // Until all calls are settled, or one of those that are not is late.
  void wait_for_answers(const LayerRows& layer, std::vector<RowsCall>& calls,
                        std::vector<uint8_t>& is_filled);
  void wait_for_python(const LayerRows& layer, std::vector<RowsCall> calls,
                       std::vector<uint8_t> is_filled);
  void release(std::vector<RowsCall>& calls);
  void notify() const;

  const std::shared_ptr<ExpertTable> table_;
  ExpertServer& server_;
  const Bell bell_;
  const int event_fd_;
  // Before the first batch everything is given up, so programs can be compiled and tried.
  std::atomic<int64_t> batch_{-1}, given_up_{-1};
  std::atomic<bool> is_cautious_{false};
  std::mutex mutex_;  // guards what follows
  std::unordered_map<int64_t, std::shared_ptr<Link>> links_;
  int64_t last_link_ = 0, last_number_ = 0;
  std::shared_ptr<const Plan> plan_ = std::make_shared<Plan>();
  std::unique_ptr<Missing> missing_;
};

}  // namespace milliways
