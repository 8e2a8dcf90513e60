// Carries rings to other hosts, over TCP.
//
// Each end of a carried ring has its own memory of the ring's shape. When an end has changed a
// slot, it sends what the slot has, and the carrier of the other end writes that into the same slot
// there. So router and worker read and write slots as if they shared them.
//
// A thread that changes a slot sends at once. What the connection does not take then, the carrier's
// thread sends later, from the slot: nobody changes it before the other end has answered.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "expert_table.h"
#include "rings.h"

namespace milliways {

enum class End { kRouter, kWorker };

// What goes before the bytes of a slot: its request if a router sends, its response if a worker
// does. Both hosts are little-endian.
struct SlotMessage {
  uint64_t num_bytes;
  uint32_t slot, layer, num_rows, num_selected, width, item_bytes;
  CallFence fence;
  uint32_t status, num_outputs;
  uint64_t placement_epoch;
};
static_assert(sizeof(SlotMessage) == 64);

// One end of a carried ring. It is over when the connection breaks, when the other end sends what it
// must not, or when it is closed.
class CarriedRing : public Peer {
 public:
  // Owns both descriptors: the connection, and one that is closed when this is over, so that Python
  // sees it. `bell` is rung when the other end has changed a slot.
  CarriedRing(End end, Ring ring, std::shared_ptr<ExpertTable> table, const Bell& bell, int fd,
              int hang_up_fd);
  ~CarriedRing() override;
  const Ring ring;
  // Called once, by any thread, when this is over. To be set before the carrier has it.
  std::function<void()> when_over;

  void slot_changed(int slot) override;
  void close() override;

 private:
  friend class Carrier;
  struct Unsent {
    SlotMessage message;
    const uint8_t* bytes;
    uint64_t num_sent;
  };
  // False if the connection is broken. The caller holds `mutex_`.
  bool send_some(Unsent& unsent);
  bool send_all();
  // The carrier's thread: events of epoll. False when this is over.
  bool handle(uint32_t events);
  bool receive();
  bool take_received();
  bool begin(const SlotMessage& message);
  void finish();

  const End end_;
  const std::shared_ptr<ExpertTable> table_;
  const Bell bell_;
  const int fd_;
  std::atomic<bool> is_over_{false};
  std::mutex mutex_;  // guards what follows
  int hang_up_fd_;
  std::deque<Unsent> unsent_;
  bool waits_to_send_ = false;
  int epoll_fd_ = -1;
  uint64_t key_ = 0;
  // Of the carrier's thread: bytes that were received and not yet understood, the message that is
  // being received, where its next bytes go, and how many are still to come.
  std::vector<uint8_t> received_;
  size_t num_received_ = 0;
  SlotMessage message_{};
  uint8_t* target_ = nullptr;
  uint64_t num_left_ = 0;
  bool is_in_message_ = false;
};

// A thread that receives for all carried rings of a process. It starts with the first ring.
class Carrier {
 public:
  Carrier();
  ~Carrier() { stop(); }
  void stop();
  // From now on the ring is carried, until it is over.
  void carry(const std::shared_ptr<CarriedRing>& ring);

 private:
  void run();
  const int epoll_fd_, wake_fd_;
  std::atomic<bool> is_stopping_{false};
  std::mutex mutex_;  // guards what follows
  std::unordered_map<uint64_t, std::shared_ptr<CarriedRing>> rings_;
  uint64_t last_key_ = 0;
  std::thread thread_;
};

}  // namespace milliways
