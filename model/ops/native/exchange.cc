#include "exchange.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace milliways {
namespace {

// While an answer is awaited, the thread looks for it again and again for so long, then sleeps.
constexpr int64_t kSpinNs = 200 * 1000;
// A lost wake-up would cost at most this; there should be none.
constexpr int64_t kSleepNs = 100 * 1000 * 1000;

}  // namespace

int Link::acquire() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < uses_.size(); i++) {
    const bool is_over =
        uses_[i] == Use::kAbandoned &&
        ring.slot(static_cast<int>(i)).state.load(std::memory_order_acquire) == kAnswered;
    if (uses_[i] != Use::kFree && !is_over) continue;
    uses_[i] = Use::kTaken;
    sequences_[i]++;
    return static_cast<int>(i);
  }
  return -1;
}

void Link::release(int slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool is_answered = ring.slot(slot).state.load(std::memory_order_acquire) == kAnswered;
  uses_[slot] = is_answered ? Use::kFree : Use::kAbandoned;
}

int64_t Link::sequence(int slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  return sequences_[slot];
}

bool Link::is_unanswered(int slot, int64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  return uses_[slot] == Use::kAbandoned && sequences_[slot] == sequence &&
         ring.slot(slot).state.load(std::memory_order_acquire) != kAnswered;
}

void Link::note_answer(int64_t took_ns) {
  std::lock_guard<std::mutex> lock(mutex_);
  longest_ns_ = std::max(longest_ns_, took_ns);
  num_answers_++;
}

void Link::take_latency(int64_t& longest_ns, int64_t& num_answers) {
  std::lock_guard<std::mutex> lock(mutex_);
  longest_ns = longest_ns_;
  num_answers = num_answers_;
  longest_ns_ = num_answers_ = 0;
}

int64_t Exchange::open_link(Ring ring, std::shared_ptr<Peer> peer, uint64_t incarnation) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t id = ++last_link_;
  links_[id] = std::make_shared<Link>(id, std::move(ring), std::move(peer), incarnation);
  return id;
}

void Exchange::close_link(int64_t id) {
  std::shared_ptr<Link> link;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = links_.find(id);
    if (found == links_.end()) return;
    link = found->second;
    links_.erase(found);
  }
  link->is_lost = true;
  link->peer->close();
  bell_.ring();
  bell_.wake_sleepers();
}

std::shared_ptr<Link> Exchange::link(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second;
}

void Exchange::set_plan(uint64_t placement_epoch, const int64_t* targets) {
  auto plan = std::make_shared<Plan>();
  plan->placement_epoch = placement_epoch;
  plan->targets.assign(targets, targets + table_->num_layers * table_->num_experts);
  std::lock_guard<std::mutex> lock(mutex_);
  plan->links = links_;
  plan_ = std::move(plan);
}

void Exchange::begin(int64_t batch, bool is_cautious) {
  server_.is_stepping = true;
  is_cautious_ = is_cautious;
  batch_ = batch;
}

void Exchange::end() { server_.is_stepping = false; }

void Exchange::give_up(int64_t batch) {
  int64_t before = given_up_;
  while (before < batch && !given_up_.compare_exchange_weak(before, batch)) {
  }
  bell_.ring();
  bell_.wake_sleepers();
}

void Exchange::run(const LayerRows& layer) noexcept {
  const int64_t num_places = layer.num_rows * table_->num_selected;
  std::memset(layer.out, 0, num_places * table_->row_bytes());
  if (is_given_up()) return;
  std::shared_ptr<const Plan> plan;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    plan = plan_;
  }
  std::vector<RowsCall> calls;
  std::vector<uint8_t> is_filled(num_places);
  std::vector<int32_t> own_ids(num_places, -1);
  ask(layer, *plan, calls, is_filled, own_ids);
  const bool has_own =
      std::any_of(own_ids.begin(), own_ids.end(), [](int32_t id) { return id >= 0; });
  if (has_own && server_.compute_with_waiting(layer.layer, {layer.rows, own_ids.data(),
                                                            layer.num_rows, layer.out, false})) {
    for (int64_t i = 0; i < num_places; i++) is_filled[i] |= own_ids[i] >= 0;
  }
  wait_for_answers(layer, calls, is_filled);
  const bool is_whole = std::all_of(is_filled.begin(), is_filled.end(), [](bool b) { return b; });
  if (is_whole || is_given_up()) return release(calls);
  wait_for_python(layer, std::move(calls), std::move(is_filled));
}

void Exchange::ask(const LayerRows& layer, const Plan& plan, std::vector<RowsCall>& calls,
                   std::vector<uint8_t>& is_filled, std::vector<int32_t>& own_ids) {
  for (int64_t i = 0; i < static_cast<int64_t>(is_filled.size()); i++) {
    const int32_t id = layer.ids[i];
    is_filled[i] = id < 0 || id >= table_->num_experts;
    if (is_filled[i] || is_cautious_ || plan.targets.empty()) continue;
    const int64_t target = plan.targets[layer.layer * table_->num_experts + id];
    if (target == kHere) own_ids[i] = id;
    if (target <= kHere) continue;
    const auto has_target = [&](const RowsCall& call) { return call.link->id == target; };
    auto call = std::find_if(calls.begin(), calls.end(), has_target);
    if (call == calls.end()) {
      const auto found = plan.links.find(target);
      if (found == plan.links.end() || found->second->is_lost) continue;
      calls.push_back({found->second, -1, {}, 0});
      call = calls.end() - 1;
    }
    call->places.push_back(static_cast<int32_t>(i));
  }
  // A call that cannot be sent is left to Python with all of its places.
  calls.erase(std::remove_if(calls.begin(), calls.end(),
                             [&](RowsCall& call) { return !write_call(layer, plan, call); }),
              calls.end());
}

bool Exchange::write_call(const LayerRows& layer, const Plan& plan, RowsCall& call) {
  const int num_selected = table_->num_selected;
  const RingShape& shape = call.link->ring.shape;
  int64_t num_rows = 0, last = -1;
  for (const int32_t place : call.places) {
    if (place / num_selected == last) continue;
    last = place / num_selected;
    num_rows++;
  }
  const int64_t num_outputs = static_cast<int64_t>(call.places.size());
  if (table_->request_bytes(num_rows) > shape.request_bytes ||
      num_outputs * table_->row_bytes() > shape.response_bytes) {
    return false;
  }
  call.slot = call.link->acquire();
  if (call.slot < 0) return false;
  uint8_t* const request = call.link->ring.request(call.slot);
  auto* const ids = reinterpret_cast<int32_t*>(request);
  uint8_t* const rows = request + table_->ids_bytes(num_rows);
  std::fill_n(ids, num_rows * num_selected, -1);
  int64_t row = -1;
  last = -1;
  for (const int32_t place : call.places) {
    if (place / num_selected != last) {
      last = place / num_selected;
      row++;
      std::memcpy(rows + row * table_->row_bytes(), layer.rows + last * table_->row_bytes(),
                  table_->row_bytes());
    }
    ids[row * num_selected + place % num_selected] = layer.ids[place];
  }
  SlotHeader& header = call.link->ring.slot(call.slot);
  header.layer = layer.layer;
  header.num_rows = static_cast<uint32_t>(num_rows);
  header.num_selected = num_selected;
  header.width = static_cast<uint32_t>(table_->width);
  header.item_bytes = table_->item_bytes;
  header.fence = {plan.placement_epoch, call.link->incarnation};
  call.asked_ns = now_ns();
  header.state.store(kAsked, std::memory_order_release);
  call.link->ring.num_asked().fetch_add(1, std::memory_order_release);
  call.link->peer->slot_changed(call.slot);
  return true;
}

bool Exchange::look(const LayerRows& layer, RowsCall& call, std::vector<uint8_t>& is_filled) {
  const SlotHeader& header = call.link->ring.slot(call.slot);
  if (header.state.load(std::memory_order_acquire) != kAnswered) {
    // An answer that came before the loss counts.
    if (!call.link->is_lost) return false;
    call.state = CallState::kLost;
    return true;
  }
  const int64_t row_bytes = table_->row_bytes();
  call.status = header.status;
  call.placement_epoch = header.placement_epoch;
  const int64_t took_ns = now_ns() - call.asked_ns;
  // A later answer says nothing of the worker's speed: it may have been frozen.
  if (took_ns <= call.link->patience_ns) call.link->note_answer(took_ns);
  if (call.status == kOk && header.num_outputs != call.places.size()) call.status = kFault;
  if (call.status != kOk) {
    call.state = CallState::kRefused;
    return true;
  }
  call.state = CallState::kAnswered;
  const uint8_t* const rows = call.link->ring.response(call.slot);
  for (size_t i = 0; i < call.places.size(); i++) {
    std::memcpy(layer.out + call.places[i] * row_bytes, rows + i * row_bytes, row_bytes);
    is_filled[call.places[i]] = 1;
  }
  return true;
}

void Exchange::wait_for_answers(const LayerRows& layer, std::vector<RowsCall>& calls,
                                std::vector<uint8_t>& is_filled) {
  if (calls.empty()) return;
  // When the first of the open calls is late; never, if there is none.
  int64_t late_ns = INT64_MAX;
  const auto is_settled = [&] {
    late_ns = INT64_MAX;
    for (RowsCall& call : calls) {
      if (call.state != CallState::kOpen || look(layer, call, is_filled)) continue;
      late_ns = std::min(late_ns, call.asked_ns + call.link->patience_ns);
    }
    return late_ns == INT64_MAX;
  };
  for (;;) {
    if (may_spin()) {
      bell_.begin_to_spin();
      const int64_t until_ns = now_ns() + kSpinNs;
      uint32_t seen = bell_.num_rings();
      bool is_done = is_settled() || is_given_up();
      for (int turn = 0; !is_done; turn++) {
        // While this thread waits, it computes for the routers of other processes.
        if (server_.help()) turn = 0;
        for (; bell_.num_rings() == seen && turn % 64 != 63; turn++) spin_once(turn);
        seen = bell_.num_rings();
        is_done = is_settled() || is_given_up();
        if (now_ns() > until_ns) break;
      }
      bell_.stop_spinning(seen);
      // A call whose ring nobody slept for may have come since the last help.
      server_.hand_over();
      if (is_done) return;
    }
    const uint32_t seen = bell_.num_rings();
    if (is_settled() || is_given_up()) return;
    const int64_t left_ns = late_ns - now_ns();
    if (left_ns <= 0) return;
    bell_.sleep(seen, std::min(left_ns, kSleepNs), is_settled);
  }
}

void Exchange::wait_for_python(const LayerRows& layer, std::vector<RowsCall> calls,
                               std::vector<uint8_t> is_filled) {
  int64_t number;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    number = ++last_number_;
    missing_ = std::make_unique<Missing>();
    missing_->number = number;
    missing_->batch = batch_;
    missing_->layer = layer;
    missing_->calls = std::move(calls);
    missing_->is_filled = std::move(is_filled);
  }
  notify();
  for (;;) {
    const uint32_t seen = bell_.num_rings();
    bool has_changed = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (missing_->is_resumed || is_given_up()) break;
      for (RowsCall& call : missing_->calls) {
        if (call.state == CallState::kOpen) has_changed |= look(layer, call, missing_->is_filled);
      }
    }
    if (has_changed) notify();
    bell_.sleep(seen, kSleepNs, [] { return false; });
  }
  std::lock_guard<std::mutex> lock(mutex_);
  release(missing_->calls);
  missing_.reset();
}

void Exchange::fill(int64_t number, const int32_t* places, int64_t count, const uint8_t* rows) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!missing_ || missing_->number != number) return;
  const int64_t row_bytes = table_->row_bytes();
  for (int64_t i = 0; i < count; i++) {
    if (places[i] < 0 || places[i] >= static_cast<int64_t>(missing_->is_filled.size())) continue;
    std::memcpy(missing_->layer.out + places[i] * row_bytes, rows + i * row_bytes, row_bytes);
    missing_->is_filled[places[i]] = 1;
  }
}

void Exchange::resume(int64_t number) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!missing_ || missing_->number != number) return;
    missing_->is_resumed = true;
  }
  bell_.ring();
  bell_.wake_sleepers();
}

void Exchange::release(std::vector<RowsCall>& calls) {
  for (RowsCall& call : calls) call.link->release(call.slot);
}

void Exchange::notify() const {
  const uint64_t one = 1;
  // If the counter is full, Python will look anyway.
  if (write(event_fd_, &one, sizeof one) < 0) return;
}

}  // namespace milliways
