// Exchanges between three nodes in one process, with everything that may happen to them at once:
// for the sanitizers, which see races and memory errors that no result shows.
//
// Some of their rings are shared, and some are carried by connections.
// Each node has a router's thread that runs batches, and a thread that plays Python: it fills what
// is missing, gives batches up, closes links and opens them again, and replaces plans and experts.
// Every output that was neither given up nor left to Python must be the right one.
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "carrier.h"
#include "exchange.h"
#include "expert_server.h"
#include "expert_table.h"

using namespace milliways;

namespace {

constexpr int kNodes = 3, kLayers = 2, kExperts = 6, kSelected = 2, kHidden = 32, kMaxRows = 8;
constexpr int64_t kWidth = 32;

#define CHECK(what)                                                    \
  do {                                                                 \
    if (!(what)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);  \
      std::abort();                                                    \
    }                                                                  \
  } while (0)

std::shared_ptr<Mapping> new_mapping(int64_t num_bytes) {
  const int fd = memfd_create("stress", 0);
  CHECK(fd >= 0 && ftruncate(fd, num_bytes) == 0);
  auto mapping = Mapping::map(fd, num_bytes);
  close(fd);
  CHECK(mapping);
  return mapping;
}

// One expert's weights: all of one value, so that its outputs are easy to predict.
struct Weights32 {
  std::vector<uint8_t> panels;
  std::vector<float> scales;
  Weights32(int8_t value, int64_t num_in, int64_t num_out, int count)
      : panels(count * num_in * num_out, static_cast<uint8_t>(value)),
        scales(count * num_out, 1.0f / 64) {}
};

Matrix matrix_of(const Weights32& w, int64_t num_in, int64_t num_out) {
  return {Weights::kExactInt8, w.panels.data(), w.scales.data(), num_in, num_out, 1};
}

struct Node {
  explicit Node(int index)
      : index(index), bell(new_mapping(kBellBytes)),
        table(std::make_shared<ExpertTable>(kLayers, kExperts, kSelected, kWidth, 4)),
        server(table, bell), event_fd(eventfd(0, EFD_NONBLOCK)),
        exchange(table, server, bell, event_fd), up(1, kWidth, kHidden, 2),
        gate(1, kWidth, kHidden, 2), down(1, kHidden, kWidth, 2) {
    give_experts();
    server.set_fence({1, 1}, true);
  }
  // Experts 2 * index and 2 * index + 1; all experts are equal.
  void give_experts() {
    std::vector<ExpertGroup> groups;
    for (int layer = 0; layer < kLayers; layer++) {
      groups.push_back({layer, {2 * index, 2 * index + 1},
                        {matrix_of(gate, kWidth, kHidden), matrix_of(up, kWidth, kHidden),
                         matrix_of(down, kHidden, kWidth), 2}});
    }
    table->replace(groups);
  }
  const int index;
  const Bell bell;
  const std::shared_ptr<ExpertTable> table;
  ExpertServer server;
  const int event_fd;
  Exchange exchange;
  Carrier carrier;
  const Weights32 up, gate, down;
  // Of this node's router, by the number of the other node; guarded by `mutex`.
  std::mutex mutex;
  int64_t links[kNodes] = {}, rings[kNodes] = {};
};

void connect(Node& router, Node& worker) {
  constexpr int64_t kRequest = 4096, kResponse = 4096;
  const RingShape shape{4, kRequest, kResponse};
  int64_t& ring_of = router.rings[worker.index];
  int64_t& link_of = router.links[worker.index];
  if ((router.index + worker.index) % 2 == 0) {
    const Ring ring(new_mapping(shape.ring_bytes()), shape);
    ring_of = worker.server.attach(ring, std::make_shared<NearPeer>(router.bell));
    link_of = router.exchange.open_link(ring, std::make_shared<NearPeer>(worker.bell), 1);
  } else {
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    const auto end_of = [&](End end, Node& node, int fd) {
      const Ring ring(Mapping::anonymous(shape.ring_bytes()), shape);
      const int hang_up_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
      return std::make_shared<CarriedRing>(end, ring, node.table, node.bell, fd, hang_up_fd);
    };
    const auto near = end_of(End::kRouter, router, fds[0]);
    const auto far = end_of(End::kWorker, worker, fds[1]);
    link_of = router.exchange.open_link(near->ring, near, 1);
    near->when_over = [link = std::weak_ptr<Link>(router.exchange.link(link_of)),
                       bell = router.bell] {
      if (const auto lost = link.lock()) lost->is_lost = true;
      bell.ring();
      bell.wake_sleepers();
    };
    router.carrier.carry(near);
    ring_of = worker.server.attach(far->ring, far);
    worker.carrier.carry(far);
  }
  router.exchange.link(router.links[worker.index])->patience_ns = 2000 * 1000;
}

void plan(Node& node) {
  std::vector<int64_t> targets;
  for (int layer = 0; layer < kLayers; layer++) {
    for (int expert = 0; expert < kExperts; expert++) {
      targets.push_back(expert / 2 == node.index ? kHere : node.links[expert / 2]);
    }
  }
  node.exchange.set_plan(1, targets.data());
}

// The output of any expert for a row of one value, as the kernels compute it.
float expected(const Node& node, float value) {
  std::vector<float> row(kWidth, value), out(kSelected * kWidth);
  const int32_t ids[kSelected] = {2 * node.index, -1};
  const ExpertRows call{reinterpret_cast<const uint8_t*>(row.data()), ids, 1,
                        reinterpret_cast<uint8_t*>(out.data()), false};
  return node.table->compute(0, {call}) ? out[0] : NAN;
}

struct Shared {
  std::atomic<bool> is_stopping{false};
  std::atomic<int64_t> num_right{0}, num_filled{0}, num_given_up{0}, num_lost{0};
};

void run_router(Node& node, Shared& shared, const float* expected_of, int seed) {
  std::mt19937 random(seed);
  std::vector<float> rows(kMaxRows * kWidth), out(kMaxRows * kSelected * kWidth);
  std::vector<int32_t> ids(kMaxRows * kSelected);
  for (int64_t batch = 1; !shared.is_stopping; batch++) {
    node.exchange.begin(batch, random() % 50 == 0);
    for (int layer = 0; layer < kLayers; layer++) {
      const int num_rows = 1 + static_cast<int>(random() % kMaxRows);
      std::vector<int> values(num_rows);
      for (int i = 0; i < num_rows; i++) {
        values[i] = static_cast<int>(random() % 4);
        std::fill_n(&rows[i * kWidth], kWidth, static_cast<float>(values[i]));
        ids[i * kSelected] = static_cast<int32_t>(random() % kExperts);
        ids[i * kSelected + 1] = random() % 4 ? static_cast<int32_t>(random() % kExperts) : -1;
      }
      node.exchange.run({layer, num_rows, reinterpret_cast<const uint8_t*>(rows.data()),
                         ids.data(), reinterpret_cast<uint8_t*>(out.data())});
      for (int i = 0; i < num_rows * kSelected; i++) {
        const float got = out[i * kWidth], wanted = expected_of[values[i / kSelected]];
        if (ids[i] < 0) CHECK(got == 0);
        // -1 was filled by "Python", 0 is what a batch has that was given up.
        else if (got == wanted) shared.num_right++;
        else if (got == -1.0f) shared.num_filled++;
        else if (got == 0.0f) shared.num_given_up++;
        else CHECK(!"a wrong output");
      }
    }
    node.exchange.end();
  }
  node.exchange.give_up(INT64_MAX);
}

void play_python(Node& node, std::vector<std::unique_ptr<Node>>& nodes, Shared& shared, int seed) {
  std::mt19937 random(seed);
  const std::vector<float> filling(kMaxRows * kSelected * kWidth, -1.0f);
  while (!shared.is_stopping) {
    int64_t number = 0, batch = 0;
    std::vector<int32_t> places;
    node.exchange.with_missing([&](const Missing* missing) {
      if (!missing) return;
      number = missing->number;
      batch = missing->batch;
      for (size_t i = 0; i < missing->is_filled.size(); i++) {
        if (!missing->is_filled[i]) places.push_back(static_cast<int32_t>(i));
      }
      for (const RowsCall& call : missing->calls) shared.num_lost += call.state == CallState::kLost;
    });
    if (number && random() % 8 == 0) {
      node.exchange.give_up(batch);
    } else if (number) {
      node.exchange.fill(number, places.data(), static_cast<int64_t>(places.size()),
                         reinterpret_cast<const uint8_t*>(filling.data()));
      node.exchange.resume(number);
    }
    const unsigned act = random() % 400;
    Node& other = *nodes[(node.index + 1 + random() % (kNodes - 1)) % kNodes];
    if (act == 0) {
      // The connection to a worker breaks, on either side first, and is opened again.
      if (random() % 2) other.server.detach(node.rings[other.index]);
      node.exchange.close_link(node.links[other.index]);
      other.server.detach(node.rings[other.index]);
      connect(node, other);
      plan(node);
    } else if (act == 1) {
      node.give_experts();
    } else if (act == 2) {
      node.server.drop_answers(1);
    } else if (act == 3) {
      node.server.set_fence({1 + random() % 2, 1}, random() % 4 != 0);
      std::this_thread::sleep_for(std::chrono::microseconds(500));
      node.server.set_fence({1, 1}, true);
    } else if (act == 4) {
      node.exchange.give_up(batch);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 3.0;
  std::vector<std::unique_ptr<Node>> nodes;
  for (int i = 0; i < kNodes; i++) nodes.push_back(std::make_unique<Node>(i));
  for (auto& router : nodes) {
    for (auto& worker : nodes) {
      if (router != worker) connect(*router, *worker);
    }
    plan(*router);
  }
  float expected_of[4];
  for (int value = 0; value < 4; value++) {
    expected_of[value] = expected(*nodes[0], static_cast<float>(value));
    CHECK(std::isfinite(expected_of[value]));
  }
  Shared shared;
  std::vector<std::thread> threads;
  for (int i = 0; i < kNodes; i++) {
    threads.emplace_back([&, i] { run_router(*nodes[i], shared, expected_of, 10 + i); });
    threads.emplace_back([&, i] { play_python(*nodes[i], nodes, shared, 20 + i); });
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  shared.is_stopping = true;
  // Layers that wait end only when their batches are given up.
  for (auto& node : nodes) node->exchange.give_up(INT64_MAX);
  for (std::thread& thread : threads) thread.join();
  for (auto& node : nodes) node->server.stop();
  for (auto& node : nodes) node->carrier.stop();
  std::printf("%lld right, %lld filled, %lld given up, %lld calls lost\n",
              static_cast<long long>(shared.num_right), static_cast<long long>(shared.num_filled),
              static_cast<long long>(shared.num_given_up), static_cast<long long>(shared.num_lost));
  CHECK(shared.num_right > 0 && shared.num_filled > 0 && shared.num_given_up > 0);
  return 0;
}
