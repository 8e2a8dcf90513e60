// Memory that two processes of one host share: rings of calls, and bells.
//
// A ring belongs to one router and one worker. It has slots; a slot has one call: a header, the
// request, and room for the response. The router writes the request and sets kAsked; the worker
// writes the response and sets kAnswered; nobody else changes the state. So the death of either
// process leaves nothing half locked.
//
// A bell belongs to one process. Who changes a slot of a ring rings the bell of the other side.
// A thread that waits looks at its slots, and sleeps on the bell if there is nothing to do.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace milliways {

constexpr uint32_t kFree = 0, kAsked = 1, kAnswered = 2;
constexpr int64_t kRingHeaderBytes = 4096;
constexpr int64_t kSlotHeaderBytes = 256;
constexpr int64_t kBellBytes = 4096;
constexpr int kMaxSlots = 64;

// The fence of a call: what its router assumes about the worker (proto/milliways/v1/worker.proto).
struct CallFence {
  uint64_t placement_epoch, incarnation;
};

// The values of `SlotHeader::status`: 0, or the reason of a refusal (wire/errors.py).
constexpr uint32_t kOk = 0;

struct SlotHeader {
  std::atomic<uint32_t> state;
  // The request: ids [num_rows, num_selected] int32, then rows [num_rows, width].
  uint32_t layer, num_rows, num_selected, width, item_bytes;
  CallFence fence;
  // The response: rows [num_outputs, width].
  uint32_t status, num_outputs;
  uint64_t placement_epoch;
};
static_assert(sizeof(SlotHeader) <= kSlotHeaderBytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct RingShape {
  int64_t num_slots, request_bytes, response_bytes;
  int64_t slot_bytes() const;
  int64_t ring_bytes() const { return kRingHeaderBytes + num_slots * slot_bytes(); }
  bool is_sound() const;
};

// Memory that is mapped, and unmapped at the end: a file, or of this process alone. Null if the
// system refuses.
class Mapping {
 public:
  static std::shared_ptr<Mapping> map(int fd, int64_t num_bytes);
  static std::shared_ptr<Mapping> anonymous(int64_t num_bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  uint8_t* start() const { return start_; }

 private:
  Mapping(uint8_t* start, int64_t num_bytes) : start_(start), num_bytes_(num_bytes) {}
  uint8_t* const start_;
  const int64_t num_bytes_;
};

class Ring {
 public:
  Ring(std::shared_ptr<Mapping> mapping, RingShape shape)
      : shape(shape), mapping_(std::move(mapping)) {}
  const RingShape shape;
  // How many calls were ever asked: a worker need not look at the slots if it is unchanged.
  std::atomic<uint32_t>& num_asked() const {
    return *reinterpret_cast<std::atomic<uint32_t>*>(mapping_->start());
  }
  SlotHeader& slot(int i) const { return *reinterpret_cast<SlotHeader*>(slot_start(i)); }
  uint8_t* request(int i) const { return slot_start(i) + kSlotHeaderBytes; }
  uint8_t* response(int i) const { return request(i) + shape.request_bytes; }

 private:
  uint8_t* slot_start(int i) const {
    return mapping_->start() + kRingHeaderBytes + i * shape.slot_bytes();
  }
  const std::shared_ptr<Mapping> mapping_;
};

// Ringing wakes threads that sleep. It costs no system call while a thread of the owner looks at
// its slots again and again (a spinner): that thread will see what was changed.
//
// Why no wake-up is lost: a sleeper announces itself, then reads the number of rings, then looks at
// its slots, and the kernel lets it sleep only if that number is unchanged. A ringer first changes
// the slot, then the number, then looks for spinners and sleepers. A spinner that stops looks at
// the number once more after it has withdrawn, and wakes a sleeper if it has changed.
class Bell {
 public:
  explicit Bell(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {}
  void ring() const;
  // Wakes sleepers even if there is a spinner.
  void wake_sleepers() const;
  uint32_t num_rings() const { return page().rings.load(); }
  // Sleeps until the next ring after `seen`, at most so long. `look` is called once after the
  // announcement; if it returns true, there is something to do.
  template <typename Look>
  void sleep(uint32_t seen, int64_t most_ns, const Look& look) const {
    page().sleepers.fetch_add(1);
    if (page().rings.load() == seen && !look()) wait(seen, most_ns);
    page().sleepers.fetch_sub(1);
  }
  void begin_to_spin() const { page().spinners.fetch_add(1); }
  // `seen` is the number of rings before the last look at the slots.
  void stop_spinning(uint32_t seen) const {
    page().spinners.fetch_sub(1);
    if (page().rings.load() != seen) wake_sleepers();
  }

 private:
  struct Page {
    alignas(64) std::atomic<uint32_t> rings;
    alignas(64) std::atomic<uint32_t> sleepers;
    std::atomic<uint32_t> spinners;
  };
  static_assert(sizeof(Page) <= kBellBytes);
  Page& page() const { return *reinterpret_cast<Page*>(mapping_->start()); }
  void wait(uint32_t seen, int64_t most_ns) const;
  const std::shared_ptr<Mapping> mapping_;
};

// The process at the other end of a ring, as it learns of changes.
class Peer {
 public:
  virtual ~Peer() = default;
  // This process has changed a slot: it has asked, or it has answered.
  virtual void slot_changed(int slot) = 0;
  // Nothing is sent to the peer any more.
  virtual void close() {}
};

// A peer that shares the ring's memory.
class NearPeer : public Peer {
 public:
  explicit NearPeer(Bell bell) : bell_(std::move(bell)) {}
  void slot_changed(int) override { bell_.ring(); }

 private:
  const Bell bell_;
};

int64_t now_ns();

}  // namespace milliways
