// A worker's side: takes calls off the rings of its routers, and computes and answers them.
//
// It decides nothing. It refuses calls whose fence is not the worker's, and everything that the
// worker cannot compute; the router then decides, in Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "expert_table.h"
#include "rings.h"

namespace milliways {

// The values of wire/errors.py, RefusalReason.
constexpr uint32_t kStaleEpoch = 1, kStaleIncarnation = 2, kNotHeld = 3, kMalformed = 6,
                   kFault = 8;

// Spinning is only worth it if this process has a processor for each thread that may spin.
bool may_spin();
// One turn of a spinning thread: a short pause at first, then the processor is offered to others.
void spin_once(int turn);

struct ServerCounts {
  int64_t num_calls, num_merged_calls, num_rows;
};

class ExpertServer {
 public:
  // Owns a thread until `stop`. The bell is the process's own.
  ExpertServer(std::shared_ptr<ExpertTable> table, const Bell& bell);
  ~ExpertServer() { stop(); }
  void stop();

  // A router's ring, and the router. The result identifies the connection.
  int64_t attach(Ring ring, std::shared_ptr<Peer> router);
  // When this returns, nothing is read or written there.
  void detach(int64_t connection);
  // What calls must assume; nothing is computed unless `is_ready`.
  void set_fence(CallFence fence, bool is_ready);
  // The next so many calls are computed and not answered: a fault for tests.
  void drop_answers(int count) { num_to_drop_ = count; }
  int num_to_drop() const { return num_to_drop_; }
  ServerCounts counts() const;

  // True while this process computes a step. Then the server's thread does not spin, because it
  // would take the processor from the step.
  std::atomic<bool> is_stepping{false};

  // For a thread that waits anyway: computes some calls that wait. False if there is none, or if
  // another thread computes.
  bool help();
  // Computes rows of this process, together with calls to the same layer that wait. False, with
  // nothing to be read, if an expert is not here or the computation failed.
  bool compute_with_waiting(int layer, const ExpertRows& own);
  // For a thread that has stopped helping: wakes the server's thread if a call may wait.
  void hand_over();

 private:
  struct Connection {
    Connection(Ring ring, std::shared_ptr<Peer> router)
        : ring(std::move(ring)), router(std::move(router)) {}
    const Ring ring;
    const std::shared_ptr<Peer> router;
    uint32_t num_seen = 0;                // calls that were answered or dropped
    bool is_dropped[kMaxSlots] = {};      // computed, and never to be answered
  };
  struct Taken {
    Connection* connection;
    int slot;
    std::vector<int32_t> ids;
    int64_t num_rows;
    int64_t num_outputs;
  };

  void serve();
  // Waits for `mutex_`. No thread overtakes one that waits, although a mutex would allow it: the
  // threads that compute let go of it for an instant only.
  std::unique_lock<std::mutex> take_turn();
  // Owns nothing if another thread computes, or waits for its turn.
  std::unique_lock<std::mutex> try_turn();
  // The caller of these holds `mutex_`.
  bool has_waiting() const;
  static bool has_asked(const Connection& connection);
  static bool is_waiting(const Connection& connection, int slot);
  // Calls to one layer, which are computed together.
  struct Batch {
    int layer;
    std::vector<Taken> calls;
    int64_t num_rows = 0;
  };

  // The caller of these holds `mutex_`, unless the batch is empty. A layer of -1 means the layer of
  // the first call found.
  Batch take(int layer);
  void take_slot(Connection& connection, int slot, Batch& batch);
  bool compute(const Batch& batch, const ExpertRows* own);
  void answer(Connection& connection, int slot, uint32_t status, uint32_t num_outputs);

  const std::shared_ptr<ExpertTable> table_;
  const Bell bell_;
  // Held by the thread that computes calls, and to change the connections.
  std::mutex mutex_;
  // Held while waiting for `mutex_`.
  std::mutex turn_mutex_;
  std::unordered_map<int64_t, std::unique_ptr<Connection>> connections_;
  int64_t last_connection_ = 0;
  int64_t turn_ = 0;
  std::atomic<bool> is_ready_{false};
  std::atomic<uint64_t> incarnation_{0}, placement_epoch_{0};
  std::atomic<int> num_to_drop_{0};
  std::atomic<int64_t> num_calls_{0}, num_merged_{0}, num_rows_{0};
  std::atomic<bool> is_stopping_{false};
  std::thread thread_;
};

}  // namespace milliways
