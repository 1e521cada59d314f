#include "tests/transport/node.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>
#include <utility>

#include "base/random.h"
#include "transport/ucx_one_sided.h"
#include "transport/ucx_packed.h"

namespace kvrelay::transport {
namespace {

constexpr uint64_t kRecordBytes = 64 * sizeof(LeaseRecord);

uint64_t Word(uint64_t seed, uint64_t index) {
  uint64_t x = seed * 0x9e3779b97f4a7c15ULL + index;
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ULL;
  return x ^ (x >> 27);
}

uint64_t EpochOf(uint32_t slot) { return 1000 + slot; }
uint64_t HashOf(uint32_t slot) { return 0xabcdef00ULL + slot; }

CopyPlan OneBox(int64_t src, int64_t dst, uint64_t bytes) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = bytes;
  plan.places.push_back({0, 0, static_cast<uint64_t>(src), static_cast<uint64_t>(dst)});
  plan.segments.push_back({0, 0});
  return plan;
}

std::string Hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const unsigned char c : bytes) {
    out.push_back(kDigits[c >> 4]);
    out.push_back(kDigits[c & 15]);
  }
  return out;
}

}  // namespace

Executor Control::executor() {
  return [queue = queue_](std::function<void()> closure) {
    const std::lock_guard lock(queue->mutex);
    queue->closures.push_back(std::move(closure));
  };
}

bool Control::RunUntil(const std::function<bool()>& done, Duration timeout) {
  const TimePoint limit = In(timeout);
  while (!done()) {
    std::function<void()> closure;
    {
      const std::lock_guard lock(queue_->mutex);
      if (!queue_->closures.empty()) {
        closure = std::move(queue_->closures.front());
        queue_->closures.pop_front();
      }
    }
    if (closure) {
      closure();
    } else if (std::chrono::steady_clock::now() >= limit) {
      return false;
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
  return true;
}

std::string WhyMissing(const std::string& transport) {
  if (transport != "ucx-get") return "";
  const auto lanes = FindOneSidedLanes("");
  return lanes.has_value() ? "" : lanes.error().message();
}

GuardExpectation Lease(const PeerSpec& owner, uint32_t slot, uint32_t tokens) {
  return {.epoch = EpochOf(slot),
          .incarnation = owner.incarnation,
          .table_hash = HashOf(slot),
          .extent = {.tokens = tokens}};
}

Node::Node(const std::string& path, const std::string& run_dir, uint64_t kv_bytes,
           const std::function<void(Options&)>& change)
    : incarnation_(RandomIncarnation()) {
  auto kv = Region::AllocateHost(kv_bytes, "kvrelay-test-kv");
  auto records = Region::AllocateHost(kRecordBytes, "kvrelay-test-records");
  if (!kv.has_value() || !records.has_value()) std::abort();
  kv_.emplace(std::move(*kv));
  records_.emplace(std::move(*records));
  Options options;
  for (const Region* region : {&*kv_, &*records_}) {
    options.regions.push_back(LocalRegion::Of(*region));
  }
  options.executor = control_.executor();
  options.run_dir = run_dir;
  options.incarnation = incarnation_;
  if (change) change(options);
  const auto kind = std::ranges::find(TransportKinds(), path, &TransportKind::name);
  auto transport = kind == TransportKinds().end() ? CreateUcxRail(options) : kind->create(options);
  if (!transport.has_value()) {
    fprintf(stderr, "%s\n", transport.error().ToString().c_str());
    std::abort();
  }
  transport_ = std::move(*transport);
}

Node::~Node() { transport_.reset(); }

LeaseRecord* Node::record(uint32_t slot) {
  return reinterpret_cast<LeaseRecord*>(records_->data()) + slot;
}

void Node::StartLease(uint32_t slot, uint32_t tokens) {
  record(slot)->Start(EpochOf(slot), incarnation_, HashOf(slot));
  record(slot)->Publish({.tokens = tokens, .chunk_end = tokens, .layers = 0});
}

PeerSpec Node::Spec(const std::string& name) const {
  return {.name = name,
          .address = transport_->LocalAddress(),
          .region_bytes = {kv_->bytes(), records_->bytes()},
          .incarnation = incarnation_};
}

void Node::Fill(uint64_t seed) {
  auto* words = reinterpret_cast<uint64_t*>(kv_->data());
  for (uint64_t i = 0; i < kv_bytes() / 8; ++i) words[i] = Word(seed, i);
}

std::optional<uint64_t> Node::FirstWrong(uint64_t seed, uint64_t bytes) const {
  const auto* words = reinterpret_cast<const uint64_t*>(kv_->data());
  for (uint64_t i = 0; i < bytes / 8; ++i) {
    if (words[i] != Word(seed, i)) return i * 8;
  }
  return std::nullopt;
}

Result<PeerHandle> Node::Connect(const PeerSpec& peer, std::function<void()> on_death,
                                 Duration timeout) {
  std::optional<Result<PeerHandle>> result;
  transport_->Connect(
      peer, In(timeout), [&](Result<PeerHandle> connected) { result = std::move(connected); },
      std::move(on_death));
  if (!control_.RunUntil([&] { return result.has_value(); }, timeout + std::chrono::seconds(5))) {
    std::abort();  // the callback would write to a dead frame
  }
  return *result;
}

Completion Node::Await(const std::function<OpId(Done)>& start) {
  auto result = std::make_shared<std::optional<Completion>>();
  start([result](Completion completion) {
    EXPECT_FALSE(result->has_value()) << "an operation completed twice";
    *result = std::move(completion);
  });
  if (!control_.RunUntil([&] { return result->has_value(); }, std::chrono::seconds(30))) {
    Completion never;
    never.status = Status(Code::kInternal, "the operation did not complete in 30 s");
    return never;
  }
  return **result;
}

CopyPlan Contiguous(uint64_t offset, uint64_t bytes) {
  return OneBox(static_cast<int64_t>(offset), static_cast<int64_t>(offset), bytes);
}

StreamPlan SendPlan(uint32_t chunks, uint64_t chunk_bytes) {
  return {.chunks = chunks,
          .max_chunk_bytes = chunk_bytes,
          .plan_chunk = [chunk_bytes](uint32_t chunk) -> Result<CopyPlan> {
            return OneBox(static_cast<int64_t>(chunk * chunk_bytes), 0, chunk_bytes);
          }};
}

StreamPlan ReceivePlan(uint32_t chunks, uint64_t chunk_bytes) {
  return {.chunks = chunks,
          .max_chunk_bytes = chunk_bytes,
          .plan_chunk = [chunk_bytes](uint32_t chunk) -> Result<CopyPlan> {
            return OneBox(0, static_cast<int64_t>(chunk * chunk_bytes), chunk_bytes);
          }};
}

TimePoint In(Duration time) { return std::chrono::steady_clock::now() + time; }

std::string ToText(const PeerSpec& spec) {
  std::string text = std::to_string(spec.incarnation) + ',' + Hex(spec.address);
  for (const uint64_t bytes : spec.region_bytes) text += ',' + std::to_string(bytes);
  return text;
}

PeerSpec FromText(const std::string& text) {
  PeerSpec spec;
  spec.name = "the other process";
  std::istringstream in(text);
  std::string field;
  std::getline(in, field, ',');
  spec.incarnation = std::stoull(field);
  std::getline(in, field, ',');
  for (size_t i = 0; i + 1 < field.size(); i += 2) {
    spec.address.push_back(static_cast<char>(std::stoi(field.substr(i, 2), nullptr, 16)));
  }
  while (std::getline(in, field, ',')) spec.region_bytes.push_back(std::stoull(field));
  return spec;
}

}  // namespace kvrelay::transport
