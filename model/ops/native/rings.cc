#include "rings.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace milliways {

int64_t RingShape::slot_bytes() const {
  // Whole pages: a slot that was never used costs no memory.
  return (kSlotHeaderBytes + request_bytes + response_bytes + 4095) / 4096 * 4096;
}

bool RingShape::is_sound() const {
  constexpr int64_t kMost = int64_t{1} << 40;
  return num_slots > 0 && num_slots <= kMaxSlots && request_bytes > 0 && response_bytes > 0 &&
         request_bytes % 64 == 0 && request_bytes < kMost && response_bytes < kMost;
}

std::shared_ptr<Mapping> Mapping::map(int fd, int64_t num_bytes) {
  struct stat file;
  // A shorter file would mean SIGBUS later. It cannot shrink: its maker has sealed it.
  if (num_bytes <= 0 || fstat(fd, &file) != 0 || file.st_size < num_bytes) return nullptr;
  void* start = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (start == MAP_FAILED) return nullptr;
  return std::shared_ptr<Mapping>(new Mapping(static_cast<uint8_t*>(start), num_bytes));
}

std::shared_ptr<Mapping> Mapping::anonymous(int64_t num_bytes) {
  constexpr int kHow = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, kHow, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  return std::shared_ptr<Mapping>(new Mapping(static_cast<uint8_t*>(start), num_bytes));
}

Mapping::~Mapping() { munmap(start_, num_bytes_); }

void Bell::ring() const {
  page().rings.fetch_add(1);
  if (page().spinners.load() == 0) wake_sleepers();
}

void Bell::wake_sleepers() const {
  if (page().sleepers.load() > 0) {
    syscall(SYS_futex, &page().rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

void Bell::wait(uint32_t seen, int64_t most_ns) const {
  if (most_ns <= 0) return;
  const timespec most{most_ns / 1000000000, most_ns % 1000000000};
  syscall(SYS_futex, &page().rings, FUTEX_WAIT, seen, &most, nullptr, 0);
}

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

}  // namespace milliways
