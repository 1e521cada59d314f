// The owner's side of a packed read: coordinates come in, are checked against the lease, and the
// transport streams chunks.
#include <algorithm>
#include <memory>

#include "agent/decode_request.h"
#include "agent/owner_rank.h"
#include "agent/terms.h"
#include "kvcache/owned_side.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr size_t kMaxStreams = 1024;  // of one rank, over all readers

}  // namespace

Status OwnerRank::CheckPackedRead(const proto::PackedRead& read) const {
  if (read.owner_incarnation != identity_.incarnation) {
    return {Code::kLeaseEnded, "PACKED_READ is for a former process of this rank"};
  }
  const auto it = held_.find(read.lease);
  if (it == held_.end() || it->second.epoch != read.epoch) {
    return {Code::kLeaseEnded,
            "PACKED_READ: the lease is not live on rank " + std::to_string(identity_.rank)};
  }
  const Held& held = it->second;
  const StreamShape& shape = read.shape;
  const KvShard& shard = identity_.shard;
  if (shape.tokens.begin < held.first_token || shape.tokens.begin >= shape.tokens.end ||
      shape.tokens.end > held.first_token + held.tokens) {
    return {Code::kRefused, "PACKED_READ: tokens [" + std::to_string(shape.tokens.begin) + ", " +
                                std::to_string(shape.tokens.end) + ") are not the lease's [" +
                                std::to_string(held.first_token) + ", " +
                                std::to_string(held.first_token + held.tokens) + ")"};
  }
  if (shape.layers.empty() || std::ranges::any_of(shape.layers, [&](uint32_t layer) {
        return layer < shard.layer_begin || layer >= shard.layer_end();
      })) {
    return {Code::kRefused, "PACKED_READ: its " + std::to_string(shape.layers.size()) +
                                " layers are not all on " + shard.ToString()};
  }
  const KvHeads heads =
      shape.head_group < shard.num_head_groups() ? shard.heads(shape.head_group) : KvHeads{};
  if (shape.head_begin < heads.begin || shape.head_begin >= shape.head_end ||
      shape.head_end > heads.end()) {
    return {Code::kRefused, "PACKED_READ: heads [" + std::to_string(shape.head_begin) + ", " +
                                std::to_string(shape.head_end) + ") are not all on " +
                                shard.ToString()};
  }
  return Status::Ok();
}

void OwnerRank::OnPackedRead(std::string_view body, const ResponderPtr& responder) {
  const auto read = DecodeRequest<proto::PackedRead>(env_, body);
  if (!read.has_value()) return responder->Fail(read.error());
  if (Status status = CheckPackedRead(*read); !status.ok()) return responder->Fail(status);
  const StreamKey key{{read->reader, read->reader_incarnation}, read->stream};
  if (streams_.contains(key)) {  // a repeated request: the stream is on its way
    return responder->Reply(proto::Encode(proto::Empty{}), false);
  }
  if (streams_.size() >= kMaxStreams) {
    return responder->Fail({Code::kOverloaded, "PACKED_READ: " + std::to_string(kMaxStreams) +
                                                   " streams are being sent already"});
  }
  transport::Transport* transport = nullptr;
  for (transport::Transport* candidate : transports_) {
    if (candidate->name() == read->transport && candidate->style() == transport::Style::kPacked) {
      transport = candidate;
    }
  }
  if (transport == nullptr) {
    return responder->Fail(
        {Code::kIncompatible, "PACKED_READ: no packed transport '" + read->transport + "' here"});
  }
  const Held& held = held_.at(read->lease);
  // The plan runs on the transfer thread after the lease may have ended: it holds what it needs by
  // value.
  struct Source {
    OwnedSide side;
    StreamChunks chunks;
  };
  OwnedSide side(identity_.layout, identity_.shard, held.tables);
  const auto chunks =
      StreamChunks::Make(read->shape, read->chunk_bytes, StreamScales(read->shape, side.view()));
  if (!chunks.has_value()) return responder->Fail(chunks.error());
  const auto source = std::make_shared<const Source>(Source{std::move(side), *chunks});
  if (const auto first = source->chunks.PlanPack(source->side.view(), 0); !first.has_value()) {
    return responder->Fail(first.error().Wrap("PACKED_READ"));
  }
  transport::StreamPlan plan{
      .chunks = chunks->count(),
      .max_chunk_bytes = read->chunk_bytes,
      .plan_chunk =
          [source](uint32_t chunk) { return source->chunks.PlanPack(source->side.view(), chunk); },
      .extent_of = [source, first = identity_.shard.layer_begin](
                       uint32_t chunk) { return source->chunks.ExtentOf(chunk, first); }};
  const GuardExpectation want{.epoch = held.epoch,
                              .incarnation = identity_.incarnation,
                              .table_hash = held.table_hash,
                              .extent = {.tokens = read->shape.tokens.end}};
  transport::PeerSpec reader{.name = "reader " + read->reader.ToHex().substr(0, 8),
                             .address = read->address,
                             .region_bytes = {},
                             .incarnation = read->reader_incarnation};
  streams_[key] = {read->lease, transport, 0};
  streams_[key].op = transport->StartPackedSend(
      std::move(reader), read->stream, std::move(plan), &memory_.records[held.slot], want,
      TermsOf(read->lease, read->priority, env_.clock.Now() + Millis(read->timeout_ms)),
      [this, key](const transport::Completion& done) {
        streams_.erase(key);
        env_.counters.Add(done.status.ok() ? "kvrelay_packed_sends_total{outcome=\"ok\"}"
                                           : "kvrelay_packed_sends_total{outcome=\"failed\"}");
      });
  responder->Reply(proto::Encode(proto::Empty{}), false);
}

void OwnerRank::OnPackedCancel(std::string_view body, const ResponderPtr& responder) {
  const auto cancel = DecodeRequest<proto::PackedCancel>(env_, body);
  if (!cancel.has_value()) return responder->Fail(cancel.error());
  const auto it = streams_.find({{cancel->reader, cancel->reader_incarnation}, cancel->stream});
  if (it != streams_.end()) it->second.transport->Cancel(it->second.op);
  responder->Reply(proto::Encode(proto::Empty{}), false);
}

}  // namespace kvrelay::agent
