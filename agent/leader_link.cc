#include "agent/leader_link.h"

#include <algorithm>

#include "proto/codec.h"

namespace kvrelay::agent {

LeaderLink::LeaderLink(Env& env, Incarnation rank_incarnation) {
  // A HELLO of an older incarnation that arrives late must not take the rank back: incarnations
  // seen once never return.
  env.rpc.Handle(proto::Type::kHello, [this, rank_incarnation, former = std::vector<Incarnation>()](
                                          std::string_view body,
                                          const ResponderPtr& responder) mutable {
    const auto hello = proto::Decode<proto::Hello>(body);
    if (!hello.has_value()) return responder->Fail(hello.error());
    if (hello->leader == 0) {
      return responder->Fail({Code::kInvalidArgument, "HELLO: leader incarnation is 0"});
    }
    if (hello->leader != leader_) {
      if (std::ranges::find(former, hello->leader) != former.end()) {
        return responder->Fail({Code::kRefused, "HELLO of a leader that was replaced already"});
      }
      if (leader_ != 0) former.push_back(leader_);
      leader_ = hello->leader;
      for (const auto& fn : on_new_leader_) fn();
    }
    responder->Reply(proto::Encode(proto::HelloReply{.rank_incarnation = rank_incarnation}), false);
  });
}

Status LeaderLink::Check(Incarnation leader) const {
  if (leader == leader_ && leader != 0) return Status::Ok();
  return {Code::kRefused, "the message is of a leader incarnation that does not lead this rank"};
}

}  // namespace kvrelay::agent
