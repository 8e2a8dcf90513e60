// The interface of exchange and expert server: an XLA custom call, and plain C functions that
// milliways/wire/exchange.py calls.
//
// A node is all that one worker has of this: its bell, its experts, its server, its exchange.
// Functions on a node that is closed do nothing.
#include <unistd.h>

#include <cstring>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "carrier.h"
#include "exchange.h"
#include "expert_server.h"
#include "expert_table.h"
#include "rings.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace mw = milliways;

namespace {

struct Node {
  Node(std::shared_ptr<mw::Mapping> bell_page, int event_fd,
       std::shared_ptr<mw::ExpertTable> experts)
      : bell(std::move(bell_page)), table(std::move(experts)), server(table, bell),
        exchange(table, server, bell, event_fd) {}
  const mw::Bell bell;
  const std::shared_ptr<mw::ExpertTable> table;
  mw::ExpertServer server;
  mw::Exchange exchange;
  mw::Carrier carrier;
};

// Never destroyed: at exit threads may still be inside an exchange.
struct Nodes {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Node>> by_id;
  int64_t last_id = 0;
};

Nodes& nodes() {
  static auto* instance = new Nodes;
  return *instance;
}

std::shared_ptr<Node> find(int64_t id) {
  std::shared_lock<std::shared_mutex> lock(nodes().mutex);
  const auto found = nodes().by_id.find(id);
  return found == nodes().by_id.end() ? nullptr : found->second;
}

// `where` has the number of the node and that of the program's first layer.
ffi::Error exchange(ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> where,
                    ffi::Result<ffi::AnyBuffer> out, int64_t layer) {
  const auto rows_shape = rows.dimensions(), ids_shape = ids.dimensions();
  if (where.element_count() != 2 || rows_shape.size() != 2 || ids_shape.size() != 2 ||
      ids_shape[0] != rows_shape[0] || rows.element_type() != out->element_type() ||
      out->element_count() != ids.element_count() * static_cast<size_t>(rows_shape[1])) {
    return ffi::Error::InvalidArgument("exchange: the arrays do not fit each other");
  }
  const std::shared_ptr<Node> node = find(where.typed_data()[0]);
  if (!node) {
    std::memset(out->untyped_data(), 0, out->size_bytes());
    return ffi::Error::Success();
  }
  const mw::ExpertTable& table = *node->table;
  const int64_t number = where.typed_data()[1] + layer;
  if (number < 0 || number >= table.num_layers || ids_shape[1] != table.num_selected ||
      rows_shape[1] != table.width ||
      static_cast<int64_t>(rows.size_bytes()) != rows_shape[0] * table.row_bytes()) {
    return ffi::Error::InvalidArgument("exchange: the arrays do not fit the model");
  }
  node->exchange.run({static_cast<int>(number), rows_shape[0],
                      static_cast<const uint8_t*>(rows.untyped_data()), ids.typed_data(),
                      static_cast<uint8_t*>(out->untyped_data())});
  return ffi::Error::Success();
}

struct Ends {
  std::shared_ptr<mw::Mapping> ring, bell;
  bool are_mapped() const { return ring && bell; }
};

Ends map_ends(int ring_fd, int bell_fd, const mw::RingShape& shape) {
  if (!shape.is_sound()) return {};
  return {mw::Mapping::map(ring_fd, shape.ring_bytes()), mw::Mapping::map(bell_fd, mw::kBellBytes)};
}

std::shared_ptr<mw::Peer> near_peer(const Ends& ends) {
  return std::make_shared<mw::NearPeer>(mw::Bell(ends.bell));
}

// One end of a ring that is carried by a connection; owns both descriptors, whatever happens.
std::shared_ptr<mw::CarriedRing> carried(const std::shared_ptr<Node>& node, mw::End end, int fd,
                                         int hang_up_fd, const mw::RingShape& shape) {
  auto memory = shape.is_sound() ? mw::Mapping::anonymous(shape.ring_bytes()) : nullptr;
  if (!node || !memory) {
    close(fd);
    close(hang_up_fd);
    return nullptr;
  }
  const mw::Ring ring(std::move(memory), shape);
  return std::make_shared<mw::CarriedRing>(end, ring, node->table, node->bell, fd, hang_up_fd);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mw_exchange, exchange,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer"));

extern "C" {

// The fields are in the order of the declarations in milliways/wire/exchange.py.
struct mw_model_shape {
  int64_t num_layers, num_experts, num_selected, width, item_bytes;
};
struct mw_ring_shape {
  int64_t num_slots, request_bytes, response_bytes;
};
struct mw_stack {
  int64_t layer, num_held, kind, num_hidden;
  const int32_t* expert_ids;
  const uint8_t* panels[3];  // gate, up, down
  const float* scales[3];
  int64_t num_groups[3];
};
struct mw_missing {
  int64_t number, batch, layer, num_rows, num_calls;
};
struct mw_call {
  int64_t link, slot, sequence, state, status, placement_epoch, waited_ns, num_places;
};

int64_t mw_ring_bytes(const mw_ring_shape* shape) {
  const mw::RingShape own{shape->num_slots, shape->request_bytes, shape->response_bytes};
  return own.is_sound() ? own.ring_bytes() : -1;
}
int64_t mw_bell_bytes() { return mw::kBellBytes; }

void mw_to_bfloat16(const float* values, int64_t count, uint16_t* rounded) {
  for (int64_t i = 0; i < count; i++) rounded[i] = mw::to_bfloat16(values[i]);
}

// The number of a new node; -1 if its bell cannot be mapped, or no descriptor is left.
int64_t mw_node_open(const mw_model_shape* shape, int bell_fd, int event_fd) {
  auto bell = mw::Mapping::map(bell_fd, mw::kBellBytes);
  if (!bell) return -1;
  auto table = std::make_shared<mw::ExpertTable>(
      static_cast<int>(shape->num_layers), static_cast<int>(shape->num_experts),
      static_cast<int>(shape->num_selected), shape->width, static_cast<int>(shape->item_bytes));
  auto node = std::make_shared<Node>(std::move(bell), event_fd, std::move(table));
  if (!node->exchange.can_notify()) return -1;
  std::unique_lock<std::shared_mutex> lock(nodes().mutex);
  // The custom call has it as int32.
  nodes().by_id[++nodes().last_id] = std::move(node);
  return nodes().last_id;
}

void mw_node_close(int64_t id) {
  const auto node = find(id);
  if (!node) return;
  node->exchange.give_up(INT64_MAX);
  node->server.stop();
  node->carrier.stop();
  std::unique_lock<std::shared_mutex> lock(nodes().mutex);
  nodes().by_id.erase(id);
}

void mw_node_set_experts(int64_t id, const mw_stack* stacks, int64_t count) {
  const auto node = find(id);
  if (!node) return;
  const int64_t width = node->table->width;
  std::vector<mw::ExpertGroup> groups;
  for (int64_t i = 0; i < count; i++) {
    const mw_stack& s = stacks[i];
    const auto matrix = [&](int part, int64_t num_in, int64_t num_out) {
      return mw::Matrix{static_cast<mw::Weights>(s.kind), s.panels[part], s.scales[part], num_in,
                        num_out, static_cast<int>(s.num_groups[part])};
    };
    const mw::Experts experts{matrix(0, width, s.num_hidden), matrix(1, width, s.num_hidden),
                              matrix(2, s.num_hidden, width), static_cast<int>(s.num_held)};
    groups.push_back(
        {static_cast<int>(s.layer), {s.expert_ids, s.expert_ids + s.num_held}, experts});
  }
  node->table->replace(groups);
}

void mw_node_set_fence(int64_t id, uint64_t placement_epoch, uint64_t incarnation, int is_ready) {
  if (const auto node = find(id)) {
    node->server.set_fence({placement_epoch, incarnation}, is_ready != 0);
  }
}

void mw_node_counts(int64_t id, int64_t counts[3]) {
  const auto node = find(id);
  const mw::ServerCounts now = node ? node->server.counts() : mw::ServerCounts{};
  counts[0] = now.num_calls;
  counts[1] = now.num_merged_calls;
  counts[2] = now.num_rows;
}

void mw_node_drop_answers(int64_t id, int count) {
  if (const auto node = find(id)) node->server.drop_answers(count);
}
int mw_node_num_to_drop(int64_t id) {
  const auto node = find(id);
  return node ? node->server.num_to_drop() : 0;
}

// A worker's end of a ring, and a router's. The result identifies it; -1 if it cannot be mapped.
int64_t mw_node_attach(int64_t id, int ring_fd, int bell_fd, const mw_ring_shape* shape) {
  const auto node = find(id);
  const mw::RingShape own{shape->num_slots, shape->request_bytes, shape->response_bytes};
  const Ends ends = map_ends(ring_fd, bell_fd, own);
  if (!node || !ends.are_mapped()) return -1;
  return node->server.attach(mw::Ring(ends.ring, own), near_peer(ends));
}
void mw_node_detach(int64_t id, int64_t connection) {
  if (const auto node = find(id)) node->server.detach(connection);
}
int64_t mw_node_open_link(int64_t id, int ring_fd, int bell_fd, const mw_ring_shape* shape,
                          uint64_t incarnation) {
  const auto node = find(id);
  const mw::RingShape own{shape->num_slots, shape->request_bytes, shape->response_bytes};
  const Ends ends = map_ends(ring_fd, bell_fd, own);
  if (!node || !ends.are_mapped()) return -1;
  return node->exchange.open_link(mw::Ring(ends.ring, own), near_peer(ends), incarnation);
}
// The same for a ring that a connection carries. Both descriptors belong to the node from now on;
// `hang_up_fd` is closed when the ring is over.
int64_t mw_node_attach_carried(int64_t id, int fd, int hang_up_fd, const mw_ring_shape* shape) {
  const auto node = find(id);
  const mw::RingShape own{shape->num_slots, shape->request_bytes, shape->response_bytes};
  const auto end = carried(node, mw::End::kWorker, fd, hang_up_fd, own);
  if (!end) return -1;
  const int64_t connection = node->server.attach(end->ring, end);
  node->carrier.carry(end);
  return connection;
}
int64_t mw_node_open_carried_link(int64_t id, int fd, int hang_up_fd, const mw_ring_shape* shape,
                                  uint64_t incarnation) {
  const auto node = find(id);
  const mw::RingShape own{shape->num_slots, shape->request_bytes, shape->response_bytes};
  const auto end = carried(node, mw::End::kRouter, fd, hang_up_fd, own);
  if (!end) return -1;
  const int64_t link = node->exchange.open_link(end->ring, end, incarnation);
  end->when_over = [opened = std::weak_ptr<mw::Link>(node->exchange.link(link)),
                    bell = node->bell] {
    if (const auto lost = opened.lock()) lost->is_lost = true;
    bell.ring();
    bell.wake_sleepers();
  };
  node->carrier.carry(end);
  return link;
}
void mw_node_close_link(int64_t id, int64_t link) {
  if (const auto node = find(id)) node->exchange.close_link(link);
}
void mw_node_set_patience(int64_t id, int64_t link, int64_t patience_ns) {
  const auto node = find(id);
  const auto found = node ? node->exchange.link(link) : nullptr;
  if (found) found->patience_ns = patience_ns;
}
void mw_node_take_latency(int64_t id, int64_t link, int64_t latency[2]) {
  latency[0] = latency[1] = 0;
  const auto node = find(id);
  const auto found = node ? node->exchange.link(link) : nullptr;
  if (found) found->take_latency(latency[0], latency[1]);
}

// Whether a call that a layer no longer waits for is still unanswered, on a link that is open.
int mw_node_is_unanswered(int64_t id, int64_t link, int64_t slot, int64_t sequence) {
  const auto node = find(id);
  const auto found = node ? node->exchange.link(link) : nullptr;
  if (!found || slot < 0 || slot >= found->ring.shape.num_slots) return 0;
  return found->is_unanswered(static_cast<int>(slot), sequence);
}

void mw_node_set_plan(int64_t id, uint64_t placement_epoch, const int64_t* targets) {
  if (const auto node = find(id)) node->exchange.set_plan(placement_epoch, targets);
}
void mw_node_begin(int64_t id, int64_t batch, int is_cautious) {
  if (const auto node = find(id)) node->exchange.begin(batch, is_cautious != 0);
}
void mw_node_end(int64_t id) {
  if (const auto node = find(id)) node->exchange.end();
}
void mw_node_give_up(int64_t id, int64_t batch) {
  if (const auto node = find(id)) node->exchange.give_up(batch);
}

// Whether something is missing.
int mw_node_missing(int64_t id, mw_missing* to) {
  const auto node = find(id);
  if (!node) return 0;
  bool is_there = false;
  node->exchange.with_missing([&](const mw::Missing* missing) {
    if (!missing) return;
    is_there = true;
    const mw::LayerRows& layer = missing->layer;
    *to = {missing->number, missing->batch, layer.layer, layer.num_rows,
           static_cast<int64_t>(missing->calls.size())};
  });
  return is_there;
}

// Copies the rows and ids of a missing layer, and which places are filled, [num_rows *
// num_selected]. False if another layer is missing by now. It copies here, because the rows are gone
// as soon as any thread gives the batch up.
int mw_node_copy_missing(int64_t id, int64_t number, uint8_t* rows, int32_t* ids,
                         uint8_t* is_filled) {
  const auto node = find(id);
  if (!node) return 0;
  bool is_same = false;
  node->exchange.with_missing([&](const mw::Missing* missing) {
    if (!missing || missing->number != number) return;
    is_same = true;
    const mw::LayerRows& layer = missing->layer;
    std::memcpy(rows, layer.rows, layer.num_rows * node->table->row_bytes());
    std::memcpy(ids, layer.ids, 4 * missing->is_filled.size());
    std::memcpy(is_filled, missing->is_filled.data(), missing->is_filled.size());
  });
  return is_same;
}

// A call of a missing layer; `places` has room for all places of the layer, `rows` for the outputs
// of as many. The rows are copied if the call is answered. Both may be null.
int mw_node_call(int64_t id, int64_t number, int64_t index, mw_call* to, int32_t* places,
                 uint8_t* rows) {
  const auto node = find(id);
  if (!node) return 0;
  bool is_same = false;
  node->exchange.with_missing([&](const mw::Missing* missing) {
    if (!missing || missing->number != number) return;
    if (index < 0 || index >= static_cast<int64_t>(missing->calls.size())) return;
    is_same = true;
    const mw::RowsCall& call = missing->calls[index];
    *to = {call.link->id, call.slot, call.link->sequence(call.slot),
           static_cast<int64_t>(call.state), call.status,
           static_cast<int64_t>(call.placement_epoch), mw::now_ns() - call.asked_ns,
           static_cast<int64_t>(call.places.size())};
    if (places) std::memcpy(places, call.places.data(), 4 * call.places.size());
    if (!rows || call.state != mw::CallState::kAnswered) return;
    const int64_t row_bytes = node->table->row_bytes();
    for (size_t i = 0; i < call.places.size(); i++) {
      std::memcpy(rows + i * row_bytes, missing->layer.out + call.places[i] * row_bytes, row_bytes);
    }
  });
  return is_same;
}

void mw_node_fill(int64_t id, int64_t number, const int32_t* places, int64_t count,
                  const uint8_t* rows) {
  if (const auto node = find(id)) node->exchange.fill(number, places, count, rows);
}
void mw_node_resume(int64_t id, int64_t number) {
  if (const auto node = find(id)) node->exchange.resume(number);
}

}  // extern "C"
