// Several transports of one kind that act as one: each packed stream is dealt over them chunk by
// chunk. A transfer thread packs, copies into the kernel and unpacks one chunk at a time; two of
// them, each with a connection of its own, do so side by side.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Addresses of a process's rails. Each rail's own address checks itself.
struct StripedAddress {
  static constexpr size_t kMaxRails = 16;
  std::vector<Address> rails;  // 1 to kMaxRails

  Address Encode() const;
  // kInvalidArgument for anything that Encode does not make.
  static Result<StripedAddress> Decode(std::string_view bytes);
};

// Chunks rail, rail + rails, rail + 2 * rails, ... of `plan`.
StreamPlan StripeOf(const StreamPlan& plan, uint32_t rail, uint32_t rails);

// A transport of style kPacked over `rails` (1 to kMaxRails, all packed), each created with
// `executor`. The reader's number of rails decides how a stream is dealt: its rail i gets stripe i
// from the owner's rail i modulo the owner's number. A stream completes when all stripes have; the
// first stripe that fails cancels the others.
std::unique_ptr<Transport> Stripe(std::vector<std::unique_ptr<Transport>> rails, Executor executor);

// As many rails as `options` asks for, made by `create_rail` and striped.
Result<std::unique_ptr<Transport>> CreateStriped(
    const Options& options, Result<std::unique_ptr<Transport>> (*create_rail)(Options));

}  // namespace kvrelay::transport
