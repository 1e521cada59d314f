// What a peer asked for, checked and counted.
#pragma once

#include <string_view>

#include "agent/env.h"
#include "proto/codec.h"

namespace kvrelay::agent {

// The request's body as a T. One that is none is the sender's error (kInvalidArgument, for its
// answer) and a bad message of ours to count, however good its envelope was.
template <typename T>
Result<T> DecodeRequest(Env& env, std::string_view body) {
  auto request = proto::Decode<T>(body);
  if (!request.has_value()) env.counters.Add("kvrelay_bad_messages_total{reason=\"body\"}");
  return request;
}

}  // namespace kvrelay::agent
