#include "tests/integration/reuse_story.h"

#include <span>
#include <utility>

#include "agent/client.h"
#include "engine/fingerprint.h"
#include "proto/codec.h"

namespace kvrelay::integration {

Json ReuseStory::Ask(Talk& talk, size_t turn) {
  const auto reply = integration::Ask(decode->endpoint(), talk.Turn());
  if (!reply.has_value()) {
    ADD_FAILURE() << "turn " << turn << ": " << reply.error().ToString();
    return {};
  }
  EXPECT_EQ(reply->token_ids, reference_.Generate({talk.Turn()})[0]) << "turn " << turn;
  talk.Continue(reply->token_ids, turn);
  return reply->summary;
}

Result<Prefilled> ReuseStory::Prefill(const std::vector<uint32_t>& prompt,
                                      std::vector<proto::Reuse> offers) {
  const DirectReader reader(prefill->endpoint());
  KVRELAY_ASSIGN_OR_RETURN(agent::Client worker, agent::Client::Connect(prefill->endpoint()));
  const proto::Prefill request{.request_id = "offered",
                               .system_ids = {},
                               .token_ids = prompt,
                               .prefix_tokens = 0,
                               .model = reader.owner().model,
                               .reuse = std::move(offers),
                               .timeout_ms = 30'000};
  Prefilled done;
  const auto last = worker.Stream(proto::Type::kPrefill, proto::Encode(request), Millis(30'000),
                                  [&done](std::string_view body) -> Status {
                                    const auto reply = proto::Decode<proto::PrefillReply>(body);
                                    if (!reply) return reply.error();
                                    if (!reply->accepted) done.ticket = reply->ticket;
                                    return Status::Ok();
                                  });
  if (!last.has_value()) return Error(last.error());
  KVRELAY_ASSIGN_OR_RETURN(done.last, proto::Decode<proto::PrefillReply>(*last));
  return done;
}

uint32_t ReuseStory::Computes(const std::vector<uint32_t>& prompt, const proto::Reuse& offer) {
  const auto done = Prefill(prompt, {offer});
  EXPECT_TRUE(done.has_value()) << done.error().ToString();
  return done.has_value() ? done->last.computed_tokens : 0;
}

proto::Reuse ReuseStory::OfferOf(const DirectReader& owner, const std::string& front,
                                 const std::vector<uint32_t>& prompt, uint32_t n) {
  proto::Reuse offer;
  offer.ticket = {.owner = owner.owner().engine,
                  .incarnation = owner.owner().incarnation,
                  .front = front,
                  .model = owner.owner().model,
                  .prompt = {},
                  .prefixes = {}};
  offer.ticket.prompt.tokens = n;
  offer.ticket.prompt.hash = engine::PromptHash(owner.owner().model, std::span(prompt).first(n));
  return offer;
}

}  // namespace kvrelay::integration
