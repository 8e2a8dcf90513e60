#include "carrier.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace milliways {
namespace {

constexpr size_t kReceiveBytes = 64 << 10;
constexpr uint64_t kWake = 0;
constexpr int kMaxEvents = 32;

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

CarriedRing::CarriedRing(End end, Ring ring, std::shared_ptr<ExpertTable> table, const Bell& bell,
                         int fd, int hang_up_fd)
    : ring(std::move(ring)), end_(end), table_(std::move(table)), bell_(bell), fd_(fd),
      hang_up_fd_(hang_up_fd), received_(kReceiveBytes) {}

CarriedRing::~CarriedRing() {
  close();
  ::close(fd_);
}

void CarriedRing::slot_changed(int slot) {
  const SlotHeader& header = ring.slot(slot);
  SlotMessage message{};
  message.slot = static_cast<uint32_t>(slot);
  const uint8_t* bytes;
  if (end_ == End::kRouter) {
    message.layer = header.layer;
    message.num_rows = header.num_rows;
    message.num_selected = header.num_selected;
    message.width = header.width;
    message.item_bytes = header.item_bytes;
    message.fence = header.fence;
    message.num_bytes = table_->request_bytes(header.num_rows);
    bytes = ring.request(slot);
  } else {
    message.status = header.status;
    message.num_outputs = header.num_outputs;
    message.placement_epoch = header.placement_epoch;
    message.num_bytes = header.status == kOk ? header.num_outputs * table_->row_bytes() : 0;
    bytes = ring.response(slot);
  }
  bool is_good;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_over_) return;
    // Each slot is sent once between two messages of the other end.
    is_good = unsent_.size() < static_cast<size_t>(ring.shape.num_slots);
    if (is_good) {
      const bool is_first = unsent_.empty();
      unsent_.push_back({message, bytes, 0});
      is_good = !is_first || send_all();
    }
  }
  if (!is_good) close();
}

bool CarriedRing::send_some(Unsent& unsent) {
  constexpr uint64_t kHead = sizeof(SlotMessage);
  iovec parts[2];
  int num_parts = 0;
  if (unsent.num_sent < kHead) {
    parts[num_parts++] = {reinterpret_cast<uint8_t*>(&unsent.message) + unsent.num_sent,
                          kHead - unsent.num_sent};
  }
  const uint64_t at = unsent.num_sent < kHead ? 0 : unsent.num_sent - kHead;
  if (at < unsent.message.num_bytes) {
    parts[num_parts++] = {const_cast<uint8_t*>(unsent.bytes) + at, unsent.message.num_bytes - at};
  }
  msghdr what{};
  what.msg_iov = parts;
  what.msg_iovlen = num_parts;
  const ssize_t count = sendmsg(fd_, &what, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count < 0) return would_block();
  unsent.num_sent += count;
  return true;
}

bool CarriedRing::send_all() {
  while (!unsent_.empty()) {
    Unsent& first = unsent_.front();
    const uint64_t before = first.num_sent;
    if (!send_some(first)) return false;
    if (first.num_sent == sizeof(SlotMessage) + first.message.num_bytes) unsent_.pop_front();
    else if (first.num_sent == before) break;
  }
  if (epoll_fd_ < 0) return true;
  epoll_event event{};
  event.events = EPOLLIN | (unsent_.empty() ? 0u : static_cast<uint32_t>(EPOLLOUT));
  event.data.u64 = key_;
  const bool waits = !unsent_.empty();
  if (waits != waits_to_send_) {
    waits_to_send_ = waits;
    epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, fd_, &event);
  }
  return true;
}

bool CarriedRing::handle(uint32_t events) {
  if (is_over_) return false;
  bool is_good = true;
  if (events & EPOLLOUT) {
    std::lock_guard<std::mutex> lock(mutex_);
    is_good = send_all();
  }
  if (is_good && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) is_good = receive();
  if (!is_good) close();
  return is_good && !is_over_;
}

bool CarriedRing::receive() {
  for (;;) {
    // The bytes of a long message go where they belong; short messages come several at a time.
    const bool is_direct = is_in_message_ && num_left_ >= kReceiveBytes;
    uint8_t* const to = is_direct ? target_ : received_.data() + num_received_;
    const size_t room = is_direct ? num_left_ : received_.size() - num_received_;
    const ssize_t count = recv(fd_, to, room, MSG_DONTWAIT);
    if (count == 0) return false;
    if (count < 0) return would_block();
    if (is_direct) {
      target_ += count;
      num_left_ -= count;
      if (num_left_ == 0) finish();
    } else {
      num_received_ += count;
      if (!take_received()) return false;
    }
    if (static_cast<size_t>(count) < room) return true;
  }
}

bool CarriedRing::take_received() {
  size_t at = 0;
  for (;;) {
    const size_t there = num_received_ - at;
    if (is_in_message_) {
      const size_t count = std::min<uint64_t>(there, num_left_);
      std::memcpy(target_, received_.data() + at, count);
      at += count;
      target_ += count;
      num_left_ -= count;
      if (num_left_ > 0) break;
      finish();
    } else {
      if (there < sizeof(SlotMessage)) break;
      std::memcpy(&message_, received_.data() + at, sizeof(SlotMessage));
      at += sizeof(SlotMessage);
      if (!begin(message_)) return false;
    }
  }
  num_received_ -= at;
  std::memmove(received_.data(), received_.data() + at, num_received_);
  return true;
}

bool CarriedRing::begin(const SlotMessage& message) {
  if (message.slot >= static_cast<uint32_t>(ring.shape.num_slots)) return false;
  const int slot = static_cast<int>(message.slot);
  const uint32_t state = ring.slot(slot).state.load(std::memory_order_acquire);
  uint64_t expected, most;
  if (end_ == End::kWorker) {
    // What a call says of its rows is checked by the server, as for a ring that is shared.
    if (state == kAsked || message.num_rows == 0) return false;
    expected = table_->request_bytes(message.num_rows);
    most = ring.shape.request_bytes;
    target_ = ring.request(slot);
  } else {
    if (state != kAsked) return false;
    expected = message.status == kOk ? message.num_outputs * table_->row_bytes() : 0;
    most = ring.shape.response_bytes;
    target_ = ring.response(slot);
  }
  if (message.num_bytes != expected || expected > most) return false;
  num_left_ = message.num_bytes;
  is_in_message_ = true;
  return true;
}

void CarriedRing::finish() {
  is_in_message_ = false;
  SlotHeader& header = ring.slot(static_cast<int>(message_.slot));
  if (end_ == End::kWorker) {
    header.layer = message_.layer;
    header.num_rows = message_.num_rows;
    header.num_selected = message_.num_selected;
    header.width = message_.width;
    header.item_bytes = message_.item_bytes;
    header.fence = message_.fence;
    header.state.store(kAsked, std::memory_order_release);
    ring.num_asked().fetch_add(1, std::memory_order_release);
  } else {
    header.status = message_.status;
    header.num_outputs = message_.num_outputs;
    header.placement_epoch = message_.placement_epoch;
    header.state.store(kAnswered, std::memory_order_release);
  }
  bell_.ring();
}

void CarriedRing::close() {
  int hang_up_fd;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_over_.exchange(true)) return;
    unsent_.clear();
    hang_up_fd = hang_up_fd_;
    hang_up_fd_ = -1;
  }
  // The carrier's thread sees this as the end of the connection, and forgets the ring.
  shutdown(fd_, SHUT_RDWR);
  ::close(hang_up_fd);
  if (when_over) when_over();
}

Carrier::Carrier()
    : epoll_fd_(epoll_create1(EPOLL_CLOEXEC)), wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWake;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event);
}

void Carrier::stop() {
  if (is_stopping_.exchange(true)) return;
  const uint64_t one = 1;
  const ssize_t written = write(wake_fd_, &one, sizeof one);
  std::unordered_map<uint64_t, std::shared_ptr<CarriedRing>> rings;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    rings.swap(rings_);
  }
  if (written > 0 && thread_.joinable()) thread_.join();
  for (const auto& entry : rings) entry.second->close();
  // No ring uses them any more: `send_all` does nothing once a ring is over.
  ::close(epoll_fd_);
  ::close(wake_fd_);
}

void Carrier::carry(const std::shared_ptr<CarriedRing>& ring) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_stopping_) return ring->close();
  const uint64_t key = ++last_key_;
  rings_[key] = ring;
  {
    std::lock_guard<std::mutex> ring_lock(ring->mutex_);
    ring->epoll_fd_ = epoll_fd_;
    ring->key_ = key;
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = key;
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, ring->fd_, &event) != 0) {
    rings_.erase(key);
    return ring->close();
  }
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
}

void Carrier::run() {
  epoll_event events[kMaxEvents];
  while (!is_stopping_) {
    const int count = epoll_wait(epoll_fd_, events, kMaxEvents, -1);
    for (int i = 0; i < count && !is_stopping_; i++) {
      std::shared_ptr<CarriedRing> ring;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = rings_.find(events[i].data.u64);
        if (found == rings_.end()) continue;
        ring = found->second;
      }
      if (ring->handle(events[i].events)) continue;
      epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, ring->fd_, nullptr);
      std::lock_guard<std::mutex> lock(mutex_);
      rings_.erase(events[i].data.u64);
    }
  }
}

}  // namespace milliways
