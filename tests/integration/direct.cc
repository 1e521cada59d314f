#include "tests/integration/direct.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <thread>

#include "agent/table_hash.h"
#include "base/random.h"
#include "kvcache/owned_side.h"
#include "proto/codec.h"

namespace kvrelay::integration {
namespace {

constexpr Duration kPatience = std::chrono::seconds(20);
constexpr Incarnation kOurIncarnation = 77;

template <typename T>
Result<T> Decoded(const Result<std::string>& body) {
  if (!body) return Error(body.error());
  return proto::Decode<T>(*body);
}

}  // namespace

std::vector<uint32_t> Tokens(size_t count, uint32_t seed) {
  std::vector<uint32_t> ids(count);
  for (size_t i = 0; i < count; ++i) ids[i] = 3 + (i * i * 7 + i * 13 + seed * 31) % 250;
  return ids;
}

DirectReader::DirectReader(std::string front)
    : front_(std::move(front)), engine_(RandomId<EngineId>()) {
  const auto ping =
      Decoded<proto::PingReply>(Call(front_, proto::Type::kPing, proto::Encode(proto::Empty{})));
  EXPECT_TRUE(ping) << ping.error().ToString();
  if (ping) owner_ = *ping;
}

Result<std::string> DirectReader::Call(const std::string& endpoint, proto::Type type,
                                       std::string body) {
  if (endpoint == front_) {
    if (!client_) {
      KVRELAY_ASSIGN_OR_RETURN(client_, agent::Client::Connect(front_));
    }
    return client_->Call(type, std::move(body), kPatience);
  }
  KVRELAY_ASSIGN_OR_RETURN(agent::Client client, agent::Client::Connect(endpoint));
  return client.Call(type, std::move(body), kPatience);
}

Result<proto::Ticket> DirectReader::Prefill(const std::vector<uint32_t>& token_ids,
                                            const std::vector<uint32_t>& system_ids) {
  const proto::Prefill request{.request_id = "direct",
                               .system_ids = system_ids,
                               .token_ids = token_ids,
                               .model = owner_.model,
                               .timeout_ms = 20'000};
  proto::Ticket ticket;
  const auto keep_ticket = [&ticket](std::string_view body) -> Status {
    const auto reply = proto::Decode<proto::PrefillReply>(body);
    if (!reply) return reply.error();
    if (!reply->accepted) ticket = reply->ticket;
    return Status::Ok();
  };
  const auto finished =
      client_->Stream(proto::Type::kPrefill, proto::Encode(request), kPatience, keep_ticket);
  if (!finished) return Error(finished.error());
  return ticket;
}

proto::Claim DirectReader::ClaimFor(const proto::Ticket& ticket) const {
  return {.reader = engine_,
          .reader_incarnation = kOurIncarnation,
          .owner_incarnation = ticket.incarnation,
          .lease = ticket.prompt.lease,
          .hash = ticket.prompt.hash,
          .tokens = ticket.prompt.tokens,
          .model = ticket.model};
}

Result<proto::ClaimReply> DirectReader::Send(const proto::Claim& claim) {
  return Decoded<proto::ClaimReply>(Call(front_, proto::Type::kClaim, proto::Encode(claim)));
}

Status DirectReader::Release(const proto::Ticket& ticket) {
  const proto::Release release{
      .reader = engine_, .reader_incarnation = kOurIncarnation, .leases = {ticket.prompt.lease}};
  const auto reply = Call(front_, proto::Type::kRelease, proto::Encode(release));
  return reply ? Status::Ok() : reply.error();
}

Result<std::vector<LeaseId>> DirectReader::Heartbeat(const proto::Ticket& ticket) {
  const proto::Heartbeat heartbeat{
      .reader = engine_, .reader_incarnation = kOurIncarnation, .leases = {ticket.prompt.lease}};
  const auto reply = Decoded<proto::HeartbeatReply>(
      Call(front_, proto::Type::kHeartbeat, proto::Encode(heartbeat)));
  if (!reply) return Error(reply.error());
  return reply->ended;
}

Result<proto::Meta> DirectReader::GetMeta(const proto::ClaimRank& rank) {
  const proto::GetMeta request{
      .engine = engine_, .incarnation = kOurIncarnation, .rank = 0, .model = owner_.model};
  return Decoded<proto::Meta>(Call(rank.endpoint, proto::Type::kGetMeta, proto::Encode(request)));
}

proto::PackedRead DirectReader::ReadFor(const proto::Ticket& ticket, const proto::ClaimRank& rank,
                                        const proto::Meta& meta) const {
  const proto::TicketPart& part = ticket.prompt;
  std::vector<uint32_t> layers(rank.shard.layer_count);
  std::iota(layers.begin(), layers.end(), rank.shard.layer_begin);
  return {.reader = engine_,
          .reader_incarnation = kOurIncarnation,
          .owner_incarnation = rank.incarnation,
          .lease = part.lease,
          .epoch = rank.epoch,
          .shape = {.layers = std::move(layers),
                    .head_begin = rank.shard.head_begin,
                    .head_end = rank.shard.head_end(),
                    .tokens = {part.first_token, part.first_token + part.tokens},
                    .dtype = meta.layout.dtype,
                    .head_dim = meta.layout.head_dim,
                    .has_v = meta.layout.has_v()},
          .stream = 1,
          .chunk_bytes = 1 << 20,
          .transport = "ucx-packed",
          .address = "nobody listens here",
          .timeout_ms = 2000};
}

Status DirectReader::Send(const std::string& rank_endpoint, const proto::PackedRead& read) {
  const auto reply = Call(rank_endpoint, proto::Type::kPackedRead, proto::Encode(read));
  return reply ? Status::Ok() : reply.error();
}

GuardExpectation DirectReader::GuardFor(const proto::Ticket& ticket, const proto::ClaimReply& claim,
                                        const proto::ClaimRank& rank,
                                        const proto::Meta& meta) const {
  HashKey key{};
  EXPECT_EQ(meta.table_hash_key.size(), key.size());
  std::copy_n(meta.table_hash_key.begin(), key.size(), key.begin());
  return {.epoch = rank.epoch,
          .incarnation = rank.incarnation,
          .table_hash = agent::TableHash(key, claim.tables, ticket.prompt.hash, claim.first_token,
                                         claim.tokens),
          .extent = {.tokens = claim.first_token + claim.tokens}};
}

DirectMapping::DirectMapping(const proto::Meta& meta, const std::string& run_dir) : meta_(meta) {
  transport::Options options;
  for (const proto::RegionInfo& region : meta_.regions) {
    auto own = Region::AllocateHost(region.bytes, "direct");
    if (!own) {
      status_ = own.error();
      return;
    }
    options.regions.push_back(transport::LocalRegion::Of(*own));
    memory_.push_back(std::move(*own));
  }
  options.executor = [this](std::function<void()> fn) {
    EXPECT_TRUE(control_.Push(std::move(fn)));
  };
  options.run_dir = run_dir + "/direct";
  options.incarnation = 77;
  std::filesystem::create_directory(options.run_dir);
  std::filesystem::permissions(options.run_dir, std::filesystem::perms::owner_all);
  auto transport = transport::CreateMapped(std::move(options));
  if (!transport) {
    status_ = transport.error();
    return;
  }
  transport_ = std::move(*transport);
  transport::PeerSpec peer{
      .name = "prefill", .address = {}, .region_bytes = {}, .incarnation = meta_.incarnation};
  for (const auto& address : meta_.addresses) {
    if (address.transport == "mapped") peer.address = address.address;
  }
  for (const proto::RegionInfo& region : meta_.regions) peer.region_bytes.push_back(region.bytes);
  std::optional<Result<transport::PeerHandle>> connected;
  transport_->Connect(
      std::move(peer), std::chrono::steady_clock::now() + kPatience,
      [&connected](const Result<transport::PeerHandle>& handle) { connected = handle; }, [] {});
  RunUntil([&connected] { return connected.has_value(); });
  if (!connected || !*connected) {
    status_ = connected ? connected->error() : Status(Code::kInternal, "no answer");
    return;
  }
  peer_ = **connected;
}

DirectMapping::~DirectMapping() = default;

std::vector<std::byte> DirectMapping::memory() const {
  const Region& region = memory_.front();
  return {region.data(), region.data() + region.bytes()};
}

void DirectMapping::RunUntil(const std::function<bool()>& done) {
  const TimePoint until = std::chrono::steady_clock::now() + kPatience;
  while (!done() && std::chrono::steady_clock::now() < until) {
    std::vector<std::function<void()>> batch;
    if (control_.DrainInto(batch) == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    for (const auto& fn : batch) fn();
  }
}

transport::Completion DirectMapping::Read(const proto::ClaimReply& claim,
                                          const proto::ClaimRank& rank) {
  const OwnedSide side(meta_.layout, meta_.shard, claim.tables);
  const auto plan =
      PlanPull(side.view(), side.view(), meta_.shard.head_begin, meta_.shard.head_end(),
               {claim.first_token, claim.first_token + claim.tokens});
  if (!plan) return {.status = plan.error(), .before = {}, .after = {}, .bytes = 0};
  std::optional<transport::Completion> completion;
  transport_->Read(peer_, transport::Whole(*plan),
                   {.region = meta_.record_region, .offset = rank.slot * sizeof(LeaseRecord)},
                   std::chrono::steady_clock::now() + kPatience,
                   [&completion](const transport::Completion& done) { completion = done; });
  RunUntil([&completion] { return completion.has_value(); });
  return completion.value_or(transport::Completion{
      .status = {Code::kInternal, "no completion"}, .before = {}, .after = {}, .bytes = 0});
}

}  // namespace kvrelay::integration
