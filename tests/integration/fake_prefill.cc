#include "tests/integration/fake_prefill.h"

#include <gtest/gtest.h>

#include "base/random.h"
#include "engine/fingerprint.h"
#include "proto/codec.h"

namespace kvrelay::integration {
namespace {

constexpr Incarnation kIncarnation = 4711;

}  // namespace

FakePrefill::FakePrefill(Truth truth, Lies lies)
    : truth_(std::move(truth)), engine_(RandomId<EngineId>()), lies_(std::move(lies)) {
  agent::ZmqRpc::Options options;
  options.listen = "tcp://127.0.0.1:0";
  auto rpc = agent::ZmqRpc::Create(loop_, counters_, options);
  if (!rpc) {
    ADD_FAILURE() << rpc.error().ToString();
    return;
  }
  rpc_ = std::move(*rpc);
  endpoint_ = rpc_->endpoint();
  using proto::Type;
  rpc_->Handle(Type::kPing, [this](std::string_view, const agent::ResponderPtr& responder) {
    responder->Reply(proto::Encode(proto::PingReply{.engine = engine_,
                                                    .incarnation = kIncarnation,
                                                    .version = "fake",
                                                    .model = truth_.model,
                                                    .model_text = "fake",
                                                    .draining = false}),
                     false);
  });
  rpc_->Handle(Type::kPrefill, [this](std::string_view body, const agent::ResponderPtr& responder) {
    OnPrefill(body, responder);
  });
  rpc_->Handle(Type::kClaim, [this](std::string_view body, const agent::ResponderPtr& responder) {
    const auto claim = proto::Decode<proto::Claim>(body);
    if (!claim) return responder->Fail(claim.error());
    proto::ClaimReply reply = MakeClaim(*claim);
    if (lies_.claim) lies_.claim(reply);
    Answer(responder, Type::kClaim, proto::Encode(reply));
  });
  rpc_->Handle(Type::kGetMeta, [this](std::string_view, const agent::ResponderPtr& responder) {
    proto::Meta meta = truth_.meta;
    meta.engine = engine_;
    if (lies_.meta) lies_.meta(meta);
    Answer(responder, Type::kGetMeta, proto::Encode(meta));
  });
  rpc_->Handle(Type::kHeartbeat, [](std::string_view, const agent::ResponderPtr& responder) {
    responder->Reply(proto::Encode(proto::HeartbeatReply{.incarnation = kIncarnation, .ended = {}}),
                     false);
  });
  for (const Type type : {Type::kRelease, Type::kPackedRead, Type::kPackedCancel}) {
    rpc_->Handle(type, [](std::string_view, const agent::ResponderPtr& responder) {
      responder->Reply(proto::Encode(proto::Empty{}), false);
    });
  }
  thread_ = std::thread([this] { loop_.Run(); });
}

FakePrefill::~FakePrefill() {
  loop_.Stop();
  if (thread_.joinable()) thread_.join();
}

void FakePrefill::OnPrefill(std::string_view body, const agent::ResponderPtr& responder) {
  const auto prefill = proto::Decode<proto::Prefill>(body);
  if (!prefill) return responder->Fail(prefill.error());
  ++requests_;
  proto::PrefillReply accepted;
  accepted.accepted = true;
  Answer(responder, proto::Type::kPrefill, proto::Encode(accepted), true);

  proto::PrefillReply offered;
  offered.ticket = {.owner = engine_,
                    .incarnation = kIncarnation,
                    .front = endpoint_,
                    .model = truth_.model,
                    .prompt = {.lease = RandomId<LeaseId>(),
                               .hash = engine::PromptHash(truth_.model, prefill->token_ids),
                               .first_token = 0,
                               .tokens = static_cast<uint32_t>(prefill->token_ids.size())},
                    .prefixes = {}};
  if (lies_.ticket) lies_.ticket(offered.ticket);
  Answer(responder, proto::Type::kPrefill, proto::Encode(offered), true);

  proto::PrefillReply finished;
  finished.finished = true;
  Answer(responder, proto::Type::kPrefill, proto::Encode(finished));
}

proto::ClaimReply FakePrefill::MakeClaim(const proto::Claim& claim) const {
  const uint32_t block_size = truth_.meta.layout.block_size;
  proto::ClaimReply reply{.tables = {{}},
                          .first_token = 0,
                          .tokens = claim.tokens,
                          .ranks = {{.endpoint = endpoint_,
                                     .rank = 0,
                                     .incarnation = truth_.meta.incarnation,
                                     .slot = 0,
                                     .epoch = 12,
                                     .shard = truth_.meta.shard,
                                     .scales = {}}},
                          .ttl_ms = 10'000};
  for (BlockId block = 0; block * block_size < claim.tokens; ++block) {
    reply.tables.front().blocks.push_back(block);
  }
  return reply;
}

void FakePrefill::Answer(const agent::ResponderPtr& responder, proto::Type type, std::string body,
                         bool more) const {
  responder->Reply(lies_.bytes ? lies_.bytes(type, std::move(body)) : std::move(body), more);
}

}  // namespace kvrelay::integration
