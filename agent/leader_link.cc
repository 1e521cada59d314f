#include "agent/leader_link.h"

#include "agent/decode_request.h"
#include "proto/codec.h"

namespace kvrelay::agent {

LeaderLink::LeaderLink(Env& env, Incarnation rank_incarnation) {
  env.rpc.Handle(proto::Type::kHello, [this, &env, rank_incarnation](
                                          std::string_view body, const ResponderPtr& responder) {
    const auto hello = DecodeRequest<proto::Hello>(env, body);
    if (!hello.has_value()) return responder->Fail(hello.error());
    if (hello->leader == 0) {
      return responder->Fail({Code::kInvalidArgument, "HELLO: leader incarnation is 0"});
    }
    if (hello->leader != leader_ && hello->challenge == 0) {
      challenge_ = env.random() | 1;
    } else if (hello->leader != leader_) {
      if (hello->challenge != challenge_) {
        return responder->Fail({Code::kRefused, "HELLO: another leader was challenged since"});
      }
      leader_ = hello->leader;
      challenge_ = 0;
      for (const auto& fn : on_new_leader_) fn();
    }
    responder->Reply(
        proto::Encode(proto::HelloReply{.rank_incarnation = rank_incarnation,
                                        .challenge = hello->leader == leader_ ? 0 : challenge_}),
        false);
  });
}

Status LeaderLink::Check(Incarnation leader) const {
  if (leader == leader_ && leader != 0) return Status::Ok();
  return {Code::kRefused, "the message is of a leader incarnation that does not lead this rank"};
}

}  // namespace kvrelay::agent
