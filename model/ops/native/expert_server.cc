#include "expert_server.h"

#include <sched.h>

#include <algorithm>
#include <exception>

#include "threads.h"

namespace milliways {
namespace {

constexpr int64_t kMaxMergedRows = 1024;
// After the last call, the thread looks for the next one for so long before it sleeps. A layer of a
// small model takes about as long.
constexpr int64_t kSpinNs = 200 * 1000;
constexpr int64_t kSleepNs = 1000 * 1000 * 1000;
constexpr int kAnyLayer = -1;

}  // namespace

bool may_spin() {
  static const bool has_room = num_usable_processors() > 1;
  return has_room;
}

void spin_once(int turn) {
  if (turn < 512) pause_thread();
  else sched_yield();
}

ExpertServer::ExpertServer(std::shared_ptr<ExpertTable> table, const Bell& bell)
    : table_(std::move(table)), bell_(bell) {
  thread_ = std::thread([this] { serve(); });
}

void ExpertServer::stop() {
  if (!thread_.joinable()) return;
  is_stopping_ = true;
  bell_.ring();
  bell_.wake_sleepers();
  thread_.join();
  const auto lock = take_turn();
  connections_.clear();
}

std::unique_lock<std::mutex> ExpertServer::take_turn() {
  std::lock_guard<std::mutex> waiting(turn_mutex_);
  return std::unique_lock<std::mutex>(mutex_);
}

std::unique_lock<std::mutex> ExpertServer::try_turn() {
  std::unique_lock<std::mutex> waiting(turn_mutex_, std::try_to_lock);
  if (!waiting.owns_lock()) return std::unique_lock<std::mutex>();
  return std::unique_lock<std::mutex>(mutex_, std::try_to_lock);
}

int64_t ExpertServer::attach(Ring ring, std::shared_ptr<Peer> router) {
  const auto lock = take_turn();
  connections_[++last_connection_] =
      std::make_unique<Connection>(std::move(ring), std::move(router));
  return last_connection_;
}

void ExpertServer::detach(int64_t connection) {
  const auto lock = take_turn();
  const auto found = connections_.find(connection);
  if (found == connections_.end()) return;
  found->second->router->close();
  connections_.erase(found);
}

void ExpertServer::set_fence(CallFence fence, bool is_ready) {
  incarnation_ = fence.incarnation;
  placement_epoch_ = fence.placement_epoch;
  is_ready_ = is_ready;
}

ServerCounts ExpertServer::counts() const { return {num_calls_, num_merged_, num_rows_}; }

void ExpertServer::serve() {
  while (!is_stopping_) {
    const uint32_t seen = bell_.num_rings();
    {
      const auto lock = take_turn();
      const Batch batch = take(kAnyLayer);
      if (!batch.calls.empty()) {
        compute(batch, nullptr);
        continue;
      }
    }
    if (may_spin() && !is_stepping) {
      bell_.begin_to_spin();
      const int64_t until_ns = now_ns() + kSpinNs;
      for (int turn = 0; bell_.num_rings() == seen && !is_stepping && !is_stopping_; turn++) {
        if (turn % 64 == 63 && now_ns() > until_ns) break;
        spin_once(turn);
      }
      bell_.stop_spinning(seen);
    }
    bell_.sleep(seen, kSleepNs, [this] {
      const auto lock = take_turn();
      return is_stopping_ || has_waiting();
    });
  }
}

void ExpertServer::hand_over() {
  const auto lock = try_turn();
  if (!lock.owns_lock() || has_waiting()) bell_.wake_sleepers();
}

bool ExpertServer::has_waiting() const {
  for (const auto& entry : connections_) {
    const Connection& connection = *entry.second;
    if (!has_asked(connection)) continue;
    for (int slot = 0; slot < connection.ring.shape.num_slots; slot++) {
      if (is_waiting(connection, slot)) return true;
    }
  }
  return false;
}

// The slots decide: the count may be wrong, if the router was killed while it wrote.
bool ExpertServer::has_asked(const Connection& connection) {
  return connection.ring.num_asked().load(std::memory_order_acquire) != connection.num_seen;
}

bool ExpertServer::is_waiting(const Connection& connection, int slot) {
  return connection.ring.slot(slot).state.load(std::memory_order_acquire) == kAsked &&
         !connection.is_dropped[slot];
}

bool ExpertServer::help() {
  const auto lock = try_turn();
  if (!lock.owns_lock()) return false;
  const Batch batch = take(kAnyLayer);
  if (batch.calls.empty()) return false;
  compute(batch, nullptr);
  return true;
}

bool ExpertServer::compute_with_waiting(int layer, const ExpertRows& own) {
  const auto lock = try_turn();
  if (!lock.owns_lock()) return compute(Batch{layer, {}}, &own);
  if (!table_->has(layer, own.ids, own.num_rows * table_->num_selected)) return false;
  return compute(take(layer), &own);
}

ExpertServer::Batch ExpertServer::take(int layer) {
  Batch batch{layer, {}};
  std::vector<Connection*> order;
  for (const auto& entry : connections_) {
    Connection* connection = entry.second.get();
    if (has_asked(*connection)) order.push_back(connection);
  }
  if (order.empty()) return batch;
  // Another connection comes first each time.
  std::rotate(order.begin(), order.begin() + turn_++ % order.size(), order.end());
  for (Connection* connection : order) {
    for (int slot = 0; slot < connection->ring.shape.num_slots; slot++) {
      if (is_waiting(*connection, slot)) take_slot(*connection, slot, batch);
    }
  }
  return batch;
}

void ExpertServer::take_slot(Connection& connection, int slot, Batch& batch) {
  const SlotHeader& header = connection.ring.slot(slot);
  const RingShape& shape = connection.ring.shape;
  // Copied first: what is checked is what is used, whatever the other process writes meanwhile.
  const int64_t num_rows = header.num_rows, layer = header.layer;
  const CallFence fence = header.fence;
  const bool is_sound = num_rows > 0 && layer < table_->num_layers &&
                        header.num_selected == static_cast<uint32_t>(table_->num_selected) &&
                        header.width == static_cast<uint32_t>(table_->width) &&
                        header.item_bytes == static_cast<uint32_t>(table_->item_bytes) &&
                        table_->request_bytes(num_rows) <= shape.request_bytes;
  if (!is_sound) return answer(connection, slot, kMalformed, 0);
  if (fence.incarnation != incarnation_) return answer(connection, slot, kStaleIncarnation, 0);
  if (fence.placement_epoch < placement_epoch_) return answer(connection, slot, kStaleEpoch, 0);
  if (!is_ready_) return answer(connection, slot, kNotHeld, 0);
  if (batch.layer != kAnyLayer && batch.layer != layer) return;
  if (!batch.calls.empty() && batch.num_rows + num_rows > kMaxMergedRows) return;

  const auto* ids = reinterpret_cast<const int32_t*>(connection.ring.request(slot));
  Taken call{&connection, slot, {ids, ids + num_rows * table_->num_selected}, num_rows, 0};
  for (const int32_t id : call.ids) call.num_outputs += id >= 0;
  if (call.num_outputs * table_->row_bytes() > shape.response_bytes) {
    return answer(connection, slot, kMalformed, 0);
  }
  if (!table_->has(static_cast<int>(layer), call.ids.data(), call.ids.size())) {
    return answer(connection, slot, kNotHeld, 0);
  }
  batch.layer = static_cast<int>(layer);
  batch.num_rows += num_rows;
  batch.calls.push_back(std::move(call));
}

bool ExpertServer::compute(const Batch& batch, const ExpertRows* own) {
  std::vector<ExpertRows> calls;
  if (own) calls.push_back(*own);
  for (const Taken& call : batch.calls) {
    const Ring& ring = call.connection->ring;
    calls.push_back({ring.request(call.slot) + table_->ids_bytes(call.num_rows), call.ids.data(),
                     call.num_rows, ring.response(call.slot), true});
  }
  num_calls_ += static_cast<int64_t>(batch.calls.size());
  num_merged_ += static_cast<int64_t>(calls.size()) - 1;
  num_rows_ += batch.num_rows;
  uint32_t status = kFault;
  try {
    // Experts may have been dropped since `take` looked.
    status = table_->compute(batch.layer, calls) ? kOk : kNotHeld;
  } catch (const std::exception&) {
    // Too little memory. Own rows are left to Python, as if an expert were not here: a step that
    // failed would lose the keys and values of all sequences.
  }
  for (const Taken& call : batch.calls) {
    answer(*call.connection, call.slot, status, status == kOk ? call.num_outputs : 0);
  }
  return status == kOk;
}

void ExpertServer::answer(Connection& connection, int slot, uint32_t status,
                          uint32_t num_outputs) {
  connection.num_seen++;
  if (num_to_drop_ > 0) {
    num_to_drop_--;
    connection.is_dropped[slot] = true;
    return;
  }
  SlotHeader& header = connection.ring.slot(slot);
  header.status = status;
  header.num_outputs = num_outputs;
  header.placement_epoch = placement_epoch_;
  header.state.store(kAnswered, std::memory_order_release);
  connection.router->slot_changed(slot);
}

}  // namespace milliways
