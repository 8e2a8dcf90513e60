// What the native exchange does in moments that Python cannot arrange; see test_exchange_cases.py.
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "exchange.h"

using namespace milliways;

namespace {

constexpr int64_t kWidth = 32, kHidden = 32;
constexpr int kOwn = 0, kElsewhere = 1;

void check(bool is_true, const char* what) {
  if (is_true) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

std::shared_ptr<Mapping> new_mapping(int64_t num_bytes) {
  const int fd = memfd_create("cases", 0);
  check(fd >= 0 && ftruncate(fd, num_bytes) == 0, "memory");
  auto mapping = Mapping::map(fd, num_bytes);
  close(fd);
  return mapping;
}

double seconds_since(int64_t start_ns) { return static_cast<double>(now_ns() - start_ns) * 1e-9; }

// A worker with one expert of one layer, and its router.
struct Node {
  Node() : bell(new_mapping(kBellBytes)), table(std::make_shared<ExpertTable>(1, 2, 1, kWidth, 4)),
           server(table, bell), exchange(table, server, bell, eventfd(0, EFD_NONBLOCK)),
           panels(kWidth * kHidden, 1), scales(kHidden, 0.01f) {
    table->replace(groups());
    server.set_fence({1, 1}, true);
  }
  std::vector<ExpertGroup> groups() const {
    const Matrix matrix{Weights::kExactInt8, panels.data(), scales.data(), kWidth, kHidden, 1};
    return {{0, {kOwn}, {matrix, matrix, matrix, 1}}};
  }
  const Bell bell;
  const std::shared_ptr<ExpertTable> table;
  ExpertServer server;
  Exchange exchange;
  const std::vector<uint8_t> panels;
  const std::vector<float> scales;
};

void ask(const Ring& ring, const Bell& bell) {
  SlotHeader& header = ring.slot(0);
  header.layer = 0;
  header.num_rows = header.num_selected = 1;
  header.width = kWidth;
  header.item_bytes = 4;
  header.fence = {1, 1};
  std::memset(ring.request(0), 0, 64 + kWidth * 4);
  header.state.store(kAsked);
  ring.num_asked().fetch_add(1);
  bell.ring();
}

// A step waits for an answer. Just before it comes, another router's call does. The step looks at
// both rings of the bell at once, finds its answer, and goes on: the call must be served all the
// same, and not only when the sleeping thread happens to look again, after a second.
void no_call_is_forgotten() {
  Node node;
  const Bell elsewhere(new_mapping(kBellBytes)), router(new_mapping(kBellBytes));
  const RingShape shape{2, 4096, 4096};
  const Ring out(new_mapping(shape.ring_bytes()), shape), in(new_mapping(shape.ring_bytes()), shape);
  node.server.attach(in, std::make_shared<NearPeer>(router));
  const auto far = std::make_shared<NearPeer>(elsewhere);
  const int64_t link = node.exchange.open_link(out, far, 1);
  node.exchange.link(link)->patience_ns = int64_t{60} * 1000 * 1000 * 1000;
  const int64_t targets[2] = {kHere, link};
  node.exchange.set_plan(1, targets);
  const std::vector<float> row(kWidth, 1.0f);
  std::vector<float> outputs(kWidth);
  const int32_t id = kElsewhere;
  int num_slow = 0;
  for (int batch = 1; batch <= 100 && num_slow < 5; batch++) {
    // Long enough for the server's thread to fall asleep.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    node.exchange.begin(batch, false);
    std::thread step([&] {
      node.exchange.run({0, 1, reinterpret_cast<const uint8_t*>(row.data()), &id,
                         reinterpret_cast<uint8_t*>(outputs.data())});
      node.exchange.end();
    });
    int slot = 0;
    while (out.slot(slot).state.load() != kAsked) slot = 1 - slot;
    std::this_thread::sleep_for(std::chrono::microseconds(batch % 50));
    ask(in, node.bell);
    out.slot(slot).status = kOk;
    out.slot(slot).num_outputs = 1;
    out.slot(slot).state.store(kAnswered);
    node.bell.ring();
    const int64_t start_ns = now_ns();
    step.join();
    while (in.slot(0).state.load() != kAnswered) std::this_thread::yield();
    // The thread that forgets a call wakes after a second.
    num_slow += seconds_since(start_ns) > 0.9;
  }
  check(num_slow < 5, "calls are served at once");
}

// Experts are replaced although other threads compute without a pause.
void experts_can_be_replaced() {
  Node node;
  std::atomic<bool> is_stopping{false};
  std::atomic<int64_t> num_computed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; i++) {
    threads.emplace_back([&] {
      const std::vector<float> rows(16 * kWidth, 1.0f);
      std::vector<float> outputs(16 * kWidth);
      const std::vector<int32_t> ids(16, kOwn);
      const ExpertRows call{reinterpret_cast<const uint8_t*>(rows.data()), ids.data(), 16,
                            reinterpret_cast<uint8_t*>(outputs.data()), false};
      while (!is_stopping) num_computed += node.table->compute(0, {call});
    });
  }
  while (num_computed < 1000) std::this_thread::yield();
  for (int i = 0; i < 20; i++) node.table->replace(node.groups());
  is_stopping = true;
  for (std::thread& thread : threads) thread.join();
}

// One answer has come and its time is up; another worker has more time. Python is not asked yet.
void only_open_calls_can_be_late() {
  Node node;
  const auto far = std::make_shared<NearPeer>(Bell(new_mapping(kBellBytes)));
  const RingShape shape{2, 4096, 4096};
  const Ring quick(new_mapping(shape.ring_bytes()), shape);
  const Ring slow(new_mapping(shape.ring_bytes()), shape);
  const int64_t targets[2] = {node.exchange.open_link(quick, far, 1),
                              node.exchange.open_link(slow, far, 1)};
  node.exchange.link(targets[0])->patience_ns = int64_t{300} * 1000 * 1000;
  node.exchange.link(targets[1])->patience_ns = int64_t{60} * 1000 * 1000 * 1000;
  node.exchange.set_plan(1, targets);
  const std::vector<float> rows(2 * kWidth, 1.0f);
  std::vector<float> outputs(2 * kWidth);
  const int32_t ids[2] = {0, 1};
  node.exchange.begin(1, false);
  std::thread step([&] {
    node.exchange.run({0, 2, reinterpret_cast<const uint8_t*>(rows.data()), ids,
                       reinterpret_cast<uint8_t*>(outputs.data())});
  });
  const auto answer = [&](const Ring& ring) {
    while (ring.slot(0).state.load() != kAsked) std::this_thread::yield();
    ring.slot(0).num_outputs = 1;
    ring.slot(0).state.store(kAnswered);
    node.bell.ring();
  };
  answer(quick);
  std::this_thread::sleep_for(std::chrono::milliseconds(900));
  bool is_missing = false;
  node.exchange.with_missing([&](const Missing* missing) { is_missing = missing != nullptr; });
  answer(slow);
  if (is_missing) node.exchange.give_up(1);
  step.join();
  check(!is_missing, "the slow worker has time");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "forgotten") no_call_is_forgotten();
  else if (name == "replaced") experts_can_be_replaced();
  else if (name == "late") only_open_calls_can_be_late();
  else return 2;
  return 0;
}
