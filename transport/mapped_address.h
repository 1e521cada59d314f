// What a process says about where its mapped regions can be had: enough for a reader to tell,
// before it connects, that they cannot be had from where it is.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace kvrelay::transport {

// The two things that processes must share before a socket's path means anything.
struct HostIdentity {
  static constexpr size_t kMaxHostId = 64;
  // The boot id of the running kernel: the same in all its containers, another on every other host.
  // Or what the user calls the host instead.
  std::string host_id;
  uid_t uid = 0;
};
// `host_id`: instead of the boot id, when it is not empty; kInvalidArgument when it is not 1 to 64
// letters, digits, '-', '_', '.'.
Result<HostIdentity> ThisHost(const std::string& host_id = "");

struct MappedAddress {
  HostIdentity host;
  uint64_t nonce = 0;  // random per listener: a socket of the same name that is not ours is noticed
  std::string socket_path;

  std::string Encode() const;
  // kInvalidArgument for anything that Encode does not make.
  static Result<MappedAddress> Decode(std::string_view text);
};

// kPeerUnreachable with both sides' values when `self` cannot reach the owner's socket whatever the
// file system holds.
Status CheckSameHost(const HostIdentity& owner, const HostIdentity& self);

}  // namespace kvrelay::transport
